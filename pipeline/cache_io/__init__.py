"""Encode and decode targets: between the method's tensors and the rows of a cache."""
