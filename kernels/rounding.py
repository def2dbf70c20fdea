"""Stochastic rounding for Triton, as in :mod:`fused_ema.ema.formats`, under the same names."""

from __future__ import annotations

import triton.language as tl

from .interpreter import device

DELTA_SCALE = tl.constexpr(1024.0)
LARGEST_HALF = tl.constexpr(65504.0)
LARGEST_BFLOAT16 = tl.constexpr(0x7F7F0000)  # as float32's bits
# Smaller ones lose bits in float16.
SMALLEST_NORMAL = tl.constexpr(2.0**-14)
# Which average the first of the rule's states is to the hash.
FIRST_STATE = tl.constexpr(1 << 31)
STREAM = tl.constexpr(0x9E3779B1)


@device
def mix(x):
    """32 bits from 32 bits, each of them dependent on all: MurmurHash3's finalizer."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@device
def chunk_key(seed, index, start):
    """What the bits of a chunk depend on; its elements share the upper half of their index."""
    key = mix(seed.to(tl.uint32) ^ mix(index.to(tl.uint32)))
    return key ^ mix((start >> 32).to(tl.uint32))


@device
def random_bits(key, WHICH: tl.constexpr, start, BLOCK: tl.constexpr):
    """16 random bits an element from ``start`` on, of average WHICH, or of a state.

    Two neighbours share a hash, which the compiler makes once: ``start`` is even.
    """
    index = tl.arange(0, BLOCK).to(tl.uint32)
    pair = tl.cast((start & 0xFFFFFFFF) >> 1, tl.uint32) + (index >> 1)
    hashed = mix((key ^ (WHICH * STREAM & 0xFFFFFFFF)) ^ pair)
    return tl.where((index & 1) == 0, hashed & 0xFFFF, hashed >> 16)


@device
def round_bfloat16(value, bits):
    """float32 to bfloat16, up with the probability of what is cut off; a NaN stays one.

    No finite number becomes infinite.
    """
    pattern = value.to(tl.uint32, bitcast=True)
    low = tl.where((pattern & 0x7FFFFFFF) < LARGEST_BFLOAT16, bits, 0)
    rounded = (pattern + low) >> 16
    rounded = tl.where(value != value, 0x7FC0, rounded)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@device
def round_float16(value, bits):
    """float32 to float16 likewise, by the lower 13 bits; cut off at its largest number."""
    pattern = value.to(tl.uint32, bitcast=True)
    magnitude = (pattern & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    magnitude = tl.where(magnitude < LARGEST_HALF, magnitude, LARGEST_HALF)
    small = magnitude < SMALLEST_NORMAL
    low = bits & 0x1FFF
    normal = (magnitude.to(tl.uint32, bitcast=True) - (112 << 23) + low) >> 13
    units = tl.where(small, magnitude * 16777216.0, 0.0) + low.to(tl.float32) * (1.0 / 8192.0)
    result = tl.where(small, units.to(tl.uint32), normal) | ((pattern >> 16) & 0x8000)
    result = tl.where(value != value, 0x7E00, result)
    return result.to(tl.uint16).to(tl.float16, bitcast=True)
