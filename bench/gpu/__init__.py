"""What is run on a GPU machine that is at hand for minutes: see ``bench/gpu.sh``."""
