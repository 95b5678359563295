"""From a conversation with images to a padded batch: prompts, token ids, labels, and where vision tokens lie."""
