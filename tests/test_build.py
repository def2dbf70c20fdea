"""What build_info() tells of this build."""

from __future__ import annotations

from pathlib import Path

import torch

from fused_ema import _native, build_info


def test_build_info():
    info = build_info()
    assert info["torch"] == torch.__version__
    assert info["extension"] == "in use"
    assert info["cpu_targets"] == _native.cpu_targets()
    assert info["triton"] is None or info["triton"][0].isdigit()
    has_kernels = b".nv_fatbin" in Path(_native.__file__).read_bytes()
    assert (info["cuda"] is not None) == has_kernels
    if has_kernels:
        major, minor = info["cuda"]["version"].split(".")
        assert int(major) >= 12
        assert 0 <= int(minor) < 10
        assert all(arch.startswith("sm_") for arch in info["cuda"]["architectures"])
        assert info["cuda"]["architectures"]
