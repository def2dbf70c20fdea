"""What bears on the speed of Triton's kernels alone; a sweep sets it before they are imported."""

from __future__ import annotations

import triton.language as tl

# Programs are small, so that many share a multiprocessor: one computes while others wait for
# memory, and no program needs to load ahead.
THREADS = 128
# What a thread takes at a time. In float32 that is 16 bytes, the widest access there is. Of 16-bit
# tensors it is half as wide: as wide would need half as many registers again, and the averages
# would have to change threads, through shared memory. In float64, divisions and roots need the
# registers that more than one element would take.
ELEMENTS = {tl.float32: 4, tl.float64: 1}
# Elements of a program. It begins with a chain of three loads (chunk, slot, address), which takes
# about as long as one block: eight blocks (sixteen in float64) make that little, and with 244
# programs for a million parameters a small network still reaches all multiprocessors.
CHUNK = 4096
# Registers of a thread that steps, as NVIDIA's compiler is told: half of a multiprocessor's threads
# fit then.
MAX_REGISTERS = 64
