"""Fixtures shared by all tests."""

from __future__ import annotations

import os

import harness
import pytest
import torch
from cases import BACKENDS

# Triton reads it at its import: without a GPU its kernels run on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--backends",
        default=",".join(BACKENDS),
        help="backends that tests taking `backend` run on, separated by commas",
    )
    parser.addoption(
        "--device", default="cpu", help="device of the tests that follow an oracle, as in cuda:0"
    )


def pytest_configure(config):
    torch.set_num_threads(2)
    harness.DEVICE = torch.device(config.getoption("--device"))


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", metafunc.config.getoption("--backends").split(","))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
