"""One page and one table over several runs of the benchmarks."""
