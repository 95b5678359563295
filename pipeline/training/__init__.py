"""Stage two: train the student from the cache."""
