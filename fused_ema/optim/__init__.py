"""The optimizers, with torch's interface."""
