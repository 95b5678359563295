"""Network modules of our own: projectors, embedding, and the model classes that transformers lacks."""
