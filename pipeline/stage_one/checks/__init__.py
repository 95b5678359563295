"""What stage one refuses before the work, and when it stops: the place of the cache, the student, rejected samples."""
