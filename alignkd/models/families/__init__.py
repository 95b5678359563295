"""The model families: one class each, listed in :mod:`alignkd.models.registry`, which names their modules."""
