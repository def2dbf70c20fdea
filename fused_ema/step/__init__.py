"""How a step runs, from param groups and gradients to a kernel's launch."""
