"""Random problems with an own oracle: what holds for every seed.

A check takes a seed and raises AssertionError. ``python -m fuzz`` in ``tests`` runs them, for a
time with fresh seeds or for one seed; ``test_fuzz.py`` runs a fixed number of fixed seeds. The
oracles are in ``oracles``, in float64 numpy, with the bounds of ``tolerances.py``.
"""

from __future__ import annotations

from collections.abc import Callable

from . import interrupts, layouts, loads

CHECKS: dict[str, Callable[[int], None]] = {
    "layouts": layouts.steps,
    "lazy": layouts.lazy_gradients,
    "freezing": layouts.freezing,
    "early": layouts.early_reads,
    "refusals": layouts.refuses_before_anything_moves,
    "resumes": loads.resumes_bit_by_bit,
    "hostile": loads.loads_all_or_nothing,
    "step": interrupts.step_is_whole,
    "state_dict": interrupts.state_dict_changes_nothing,
    "load": interrupts.load_is_whole,
    "swap": interrupts.swap_changes_nothing,
}


def again(name: str, seed: int) -> str:
    """The command that repeats a check, from the folder of the repository."""
    return f"cd tests && PYTHONPATH=.. python -m fuzz {name} --seed {seed}"
