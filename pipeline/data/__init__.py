"""Data files and images as samples, prepared for a model."""
