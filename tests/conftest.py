"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS


def pytest_addoption(parser):
    parser.addoption(
        "--backends",
        default=",".join(BACKENDS),
        help="backends that tests taking `backend` run on, separated by commas",
    )


def pytest_configure(config):
    torch.set_num_threads(2)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", metafunc.config.getoption("--backends").split(","))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
