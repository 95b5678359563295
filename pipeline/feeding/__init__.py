"""From samples and cached rows to batches on time: order, checks, worker processes."""
