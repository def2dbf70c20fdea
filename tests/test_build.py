"""What build_info() tells of this build."""

from __future__ import annotations

import ast
import runpy
from types import SimpleNamespace

import torch

from fused_ema import _native, build_info
from fused_ema.extension import why_no_cuda


def test_build_info():
    info = build_info()
    assert info["torch"] == torch.__version__
    assert info["extension"] == "in use"
    assert info["cpu_targets"] == _native.cpu_targets()
    assert info["triton"] is None or info["triton"][0].isdigit()
    assert info["cuda_extension"] == (why_no_cuda or "in use")
    assert (info["cuda"] is None) == (why_no_cuda is not None)


def test_build_info_names_what_the_kernels_were_compiled_for(monkeypatch):
    kernels = SimpleNamespace(CUDA_VERSION=13020, CUDA_ARCHITECTURES=[800, 1200], CUDA_PTX=[1200])
    monkeypatch.setattr("fused_ema.build.cuda", kernels)
    monkeypatch.setattr("fused_ema.build.why_no_cuda", None)
    expected = {
        "version": "13.2",
        "architectures": ["sm_80", "sm_120"],
        "ptx": ["compute_120"],
    }
    assert build_info()["cuda"] == expected


def test_running_the_package_prints_it(capsys):
    runpy.run_module("fused_ema", run_name="__main__")
    assert ast.literal_eval(capsys.readouterr().out) == build_info()
