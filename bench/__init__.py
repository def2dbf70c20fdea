"""Benchmarks that time providers of a step with an EMA, in turns on the same data."""

import os

# torch reads it at import; without it, its profiler logs every start.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
