"""Slow and simple forms of what the package computes, which tests and benchmarks compare it with."""
