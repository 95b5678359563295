"""Answers that a model writes to the questions of a data file, as data in the same format."""
