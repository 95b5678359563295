"""Judge a model: its accuracy on a question file, and one sample as the model sees it."""
