"""Samples in the order of what they have to teach, to keep the share that is worth training on."""
