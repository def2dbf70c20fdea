"""Runs the checks for a GPU machine that is available for minutes: see ``bench/gpu.sh``."""
