"""Figures and one HTML page about finished runs."""
