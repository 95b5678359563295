"""How each kind of model reads a conversation: text to ids and labels, images to pixel values."""
