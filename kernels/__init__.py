"""The Triton kernels: :mod:`.rules` holds the maths, :mod:`.step` the kernel and its launch."""
