"""Fixtures shared by all tests."""

from __future__ import annotations

import os

import harness
import pytest
import shim_backend
import torch
from cases import BACKENDS, DEVICE_BACKENDS


def pytest_addoption(parser):
    parser.addoption(
        "--backends",
        default=",".join(BACKENDS),
        help="backends that tests taking `backend` run on, separated by commas",
    )
    parser.addoption(
        "--device",
        default="cpu",
        help="device of the tests that follow an oracle, as in cuda:0, which test_gpu.py needs",
    )


def pytest_configure(config):
    torch.set_num_threads(2)
    device = torch.device(config.getoption("--device"))
    if device.type == "cpu":
        # Triton reads it at its import: its kernels run on CPU tensors
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if "shim" in config.getoption("--backends"):
        shim_backend.register()
    harness.DEVICE = device


def pytest_generate_tests(metafunc):
    backends = metafunc.config.getoption("--backends").split(",")
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends)
    if "device_backend" in metafunc.fixturenames:
        metafunc.parametrize("device_backend", [b for b in backends if b in DEVICE_BACKENDS])


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
