"""Benchmarks: providers of a step with an EMA, timed in turns on the same data."""

import os

# Read when torch is imported: its profiler would tell of every start.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
