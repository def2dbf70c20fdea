"""Random layouts, loads and interrupts with fixed seeds; ``make fuzz`` draws fresh ones."""

from __future__ import annotations

import pytest
from fuzz import CHECKS, again
from pages import one_thread  # noqa: F401

SEEDS = 20  # a test
TESTS = {
    "layouts": 20,
    "lazy": 4,
    "freezing": 6,
    "early": 4,
    "refusals": 2,
    "resumes": 15,
    "hostile": 30,
    "step": 15,
    "state_dict": 4,
    "load": 10,
    "swap": 10,
}
CASES = [(name, first) for name, count in TESTS.items() for first in range(0, count * SEEDS, SEEDS)]


@pytest.mark.filterwarnings("ignore")  # of values that are loaded and differ, among others
@pytest.mark.parametrize(("name", "first"), CASES)
def test_holds_for_every_seed(name, first):
    failures = []
    for seed in range(first, first + SEEDS):
        try:
            CHECKS[name](seed)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}\nagain: {again(name, seed)}")
    assert not failures, "\n".join(failures)


def test_every_check_has_its_seeds():
    assert TESTS.keys() == CHECKS.keys()
