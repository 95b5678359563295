"""Pages that show what a run made."""
