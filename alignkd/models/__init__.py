"""The models: one family a file, each behind the same small contract (see :mod:`alignkd.models.vlm`)."""
