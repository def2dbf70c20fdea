"""GPUs that the CUDA kernels were not compiled for; the GPUs are made up."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import warnings
from types import SimpleNamespace

import pytest
import torch
from test_setup import names_of_setup

from fused_ema import FusedScaledSGD
from fused_ema.step import backends
from fused_ema.step.backends import coverage, native, triton


@pytest.fixture
def gpu(monkeypatch):
    """Sets the GPU's compute capability, and whether Triton can use it."""
    kernels = SimpleNamespace(CUDA_ARCHITECTURES=[800, 900, 1200], CUDA_PTX=[1200])
    monkeypatch.setattr(coverage, "cuda", kernels)
    monkeypatch.setattr(native, "why_no_cuda", None)
    coverage.warn_once.cache_clear()

    def put(major: int, minor: int, has_triton: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        reason = None if has_triton else "triton is not installed"
        monkeypatch.setattr(triton, "unsupported", lambda bucket: reason)

    return put


def bucket(backend: str = "auto"):
    """A bucket of a CPU parameter that claims to lie on a GPU."""
    made = []
    opt = FusedScaledSGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    opt.param_groups[0]["params"][0].grad = torch.ones(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_ema.step.plans.select", lambda b: made.append(b) or backends.select(b))
        opt.step()
    key = made[0].key._replace(device=torch.device("cuda:0"), backend=backend)
    return dataclasses.replace(made[0], key=key)


@pytest.mark.parametrize(
    ("capability", "code"),
    [
        ((7, 0), None),
        ((7, 5), None),
        ((8, 0), "machine code"),
        ((8, 9), "machine code"),
        ((9, 0), "machine code"),
        ((10, 0), None),
        ((12, 0), "machine code"),
        ((12, 1), "machine code"),
        ((13, 0), "PTX"),
    ],
)
def test_what_the_kernels_hold_for_a_gpu(capability, code, gpu):
    gpu(*capability)
    assert coverage.code_for(torch.device("cuda:0")) == code


def test_a_gpu_with_machine_code_gets_the_native_kernels(gpu):
    gpu(8, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select(bucket()).NAME == "native"


@pytest.mark.parametrize(("has_triton", "chosen"), [(True, "triton"), (False, "foreach")])
def test_auto_takes_another_backend_for_an_older_gpu_and_warns_once(has_triton, chosen, gpu):
    gpu(7, 5, has_triton)
    message = (
        "compiled for sm_80, sm_90, sm_120, not for device cuda:0, sm_75; rebuild with "
        "TORCH_CUDA_ARCH_LIST=7.5"
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        names = {backends.select(bucket()).NAME for _ in range(2)}
    assert names == {chosen}
    (warning,) = told
    assert warning.category is RuntimeWarning
    assert message in str(warning.message)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        backends.select(bucket("native"))


def test_auto_does_not_wait_for_ptx_where_triton_can_do(gpu):
    gpu(13, 0)
    with pytest.warns(RuntimeWarning, match="there is PTX, which takes long to compile"):
        assert backends.select(bucket()) is triton
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select(bucket("native")).NAME == "native"
        gpu(13, 0, has_triton=False)
        assert backends.select(bucket()).NAME == "native"


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([], "8.0;9.0;10.0;12.0+PTX"),
        ([(9, 0)], "8.0;9.0;10.0;12.0+PTX"),
        ([(8, 6), (7, 5)], "7.5;8.0;8.6;9.0;10.0;12.0+PTX"),
        ([(7, 0), (13, 0)], "8.0;9.0;10.0;12.0+PTX"),  # unknown to this nvcc
    ],
)
def test_the_default_build_is_for_the_gpus_here_too(gpus, expected, monkeypatch):
    names = names_of_setup(monkeypatch)
    if "architectures" not in names:
        pytest.skip("no extension is compiled here")
    listed = "\n".join(f"sm_{v}" for v in (75, 80, 86, 87, 89, 90, 100, 120, 121))
    monkeypatch.setattr(subprocess, "check_output", lambda *args, **kwargs: listed)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
    assert names["architectures"]() == expected
