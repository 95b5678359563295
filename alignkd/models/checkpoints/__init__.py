"""Checkpoint folders as they are released: names of tensors and files, and their way into our model classes."""
