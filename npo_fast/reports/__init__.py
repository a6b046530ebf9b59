"""Figures and one HTML page about finished runs."""

from npo_fast.reports.figures import MEANINGFUL, Point, plot_unlearning

__all__ = ["MEANINGFUL", "Point", "plot_unlearning"]
