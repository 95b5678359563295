"""Shards as bytes: Zarr and WebDataset."""
