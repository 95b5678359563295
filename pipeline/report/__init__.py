"""Pages that show what the jobs made."""
