"""The bytes of images: where they lie, and how they are read."""
