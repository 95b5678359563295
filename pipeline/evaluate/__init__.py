"""Judge a model: answers to questions, and one sample as the model sees it."""
