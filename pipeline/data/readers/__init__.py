"""Readers of data in tables and archives: Parquet, saved datasets, WebDataset."""
