"""How commands get their options: from the dataclasses of the configuration, a settings file, and in groups of help."""
