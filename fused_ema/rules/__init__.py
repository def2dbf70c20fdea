"""The optimizers' update maths in Python, and what it is written with."""
