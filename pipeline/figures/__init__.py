"""Figures: attention drawn over an image."""
