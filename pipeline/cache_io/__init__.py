"""Between the method's tensors and the rows of a cache."""
