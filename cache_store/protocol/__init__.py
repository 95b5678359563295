"""What makes a cache safe: manifest, plan, commit, read, verify, repair."""
