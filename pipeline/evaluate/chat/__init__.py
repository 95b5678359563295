"""A conversation with a model: its turns, answers as they are written, and where questions come from."""
