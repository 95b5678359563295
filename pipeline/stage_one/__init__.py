"""Stage one: run the teacher once and write its targets to a cache."""
