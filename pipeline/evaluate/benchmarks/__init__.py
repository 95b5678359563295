"""The benchmarks: what each asks, and what answers are worth. One file each; no model and no torch is needed to score."""
