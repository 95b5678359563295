"""Models of alignkd in other people's evaluation programs."""
