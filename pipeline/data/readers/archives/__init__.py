"""Tar archives of samples: members, how they make samples, and where these lie."""
