"""What runs left behind, as figures and as one page."""

from npo_fast.report.figures import MEANINGFUL, Point, plot_unlearning

__all__ = ["MEANINGFUL", "Point", "plot_unlearning"]
