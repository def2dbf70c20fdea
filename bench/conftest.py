"""Shows the tables of the interleaved harness after pytest-benchmark's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

TABLES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = []


@pytest.fixture
def show(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Prints a table at the end of the session."""
    return pytestconfig.stash[TABLES].append


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for table in config.stash[TABLES]:
        terminalreporter.write_line("")
        terminalreporter.write_line(table)
