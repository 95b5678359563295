"""Look after a cache without a model: progress, audit, one row. Needs no torch."""
