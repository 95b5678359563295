"""Samples: read, prepared for a model, and counted where they are rejected."""
