"""From samples and cached rows to batches in time: order, checks, loader processes."""
