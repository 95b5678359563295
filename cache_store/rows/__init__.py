"""What a row and a shard are, in memory."""
