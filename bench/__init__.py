"""Benchmarks: providers of a step with an EMA, timed in turns on the same data."""
