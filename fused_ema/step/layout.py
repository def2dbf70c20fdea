"""How the words lie that device kernels read about a bucket: csrc/layout.h has the same.

All words of a bucket, those first that change most often: rows of float64 scalars, unless they are
folded on the device; each slot's row, four 16-bit indices to a word; each slot's gradient, 0
without one; the slots.
"""

from __future__ import annotations

from typing import NamedTuple

# Indices of rows are below it, for there are no more rows than slots.
MOST_SLOTS = 1 << 16
INDICES_PER_WORD = 4


class WordLayout(NamedTuple):
    """Where the rows' indices, gradients and slots begin."""

    indices: int
    grads: int
    slots: int


def words(num_row_words: int, num_slots: int) -> WordLayout:
    """The layout of a bucket's words; ``num_row_words`` is 0 where rows are folded elsewhere."""
    grads = num_row_words + -(-num_slots // INDICES_PER_WORD)
    return WordLayout(num_row_words, grads, grads + num_slots)


class SlotLayout(NamedTuple):
    """Where a slot's words lie in it, and how many they are.

    Its number of elements, which of the optimizer's parameters it is, then addresses: the
    parameter, its master if there is one, the rule's states, the averages. ``weight`` is what the
    rule steps: the master, or the parameter itself.
    """

    numel: int
    param_index: int
    param: int
    weight: int
    first_state: int
    first_average: int
    size: int


def slot(master: bool, num_states: int, num_emas: int) -> SlotLayout:
    """The layout of a slot; ``num_states`` are the rule's."""
    weight = 2 + master
    averages = weight + 1 + num_states
    return SlotLayout(0, 1, 2, weight, weight + 1, averages, averages + num_emas)
