"""Pictures: attention drawn over an image."""
