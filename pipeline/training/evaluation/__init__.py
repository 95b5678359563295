"""A run judged while it trains: held-out samples, sampled benchmarks, the best student so far, and an early end."""
