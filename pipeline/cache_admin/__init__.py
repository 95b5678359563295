"""Look after a cache without a model: progress, audit, one row. Loads no torch."""
