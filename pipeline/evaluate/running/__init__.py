"""Answers of a model to the questions of a benchmark: in batches of like length, the tower once a picture, resumable."""
