"""What is wrong with data, all of it in one pass, before any model works on it."""
