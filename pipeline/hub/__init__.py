"""Models of the Hugging Face Hub: by name in the local cache, downloaded where that is allowed, and their cards."""
