"""Chat templates: rendered within limits, under one date, and traced, so that the characters of each answer are known."""
