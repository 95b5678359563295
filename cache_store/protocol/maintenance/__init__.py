"""What is done to a whole cache: verify it, repair it, convert it to the other format."""
