"""Two optimizers on equal parameters, given equal gradients, held against each other."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves


def parameters(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]
    return [Parameter(tensor.to(device)) for tensor in drawn]


def quantized(value: torch.Tensor) -> torch.Tensor:
    """Eight bits of ``value``, in units of 0.1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates them, and models still have them
        return torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)


def set_gradients(step: int, *lists: list[Parameter]) -> None:
    """The same gradients for every list, in the memory that the last ones had."""
    generator = torch.Generator().manual_seed(step)
    for params in zip(*lists, strict=True):
        grad = torch.randn(params[0].shape, dtype=params[0].dtype, generator=generator)
        for p in params:
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(grad)


def assert_same(opt, twin, rtol: float, atol: float) -> None:
    for group, other in zip(opt.param_groups, twin.param_groups, strict=True):
        assert float(group["base_steps"]) == pytest.approx(float(other["base_steps"]))
        for p, q in zip(group["params"], other["params"], strict=True):
            torch.testing.assert_close(p.cpu(), q.cpu(), rtol=rtol, atol=atol)
            for key, value in twin.state[q].items():
                found = leaves(opt.state[p][key])
                for mine, wanted in zip(found, leaves(value), strict=True):
                    torch.testing.assert_close(mine, wanted, rtol=rtol, atol=atol, msg=key)


def leaves(value) -> list[torch.Tensor]:
    """The tensors of nested dicts: averaged buffers are such."""
    return [tensor.cpu() for tensor in tree_leaves(value)]
