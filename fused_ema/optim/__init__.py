"""The optimizers, as torch's interface has them."""
