"""Rows and shards in memory."""
