"""Shard formats: a shard <-> the bytes of one object, as Zarr or as WebDataset."""
