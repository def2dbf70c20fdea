"""Captures and repeats a step on the CPU the way a CUDA graph does on a GPU.

While a graph is captured nothing runs: operations in place leave their tensors as they are, and new
tensors hold garbage. A replay repeats the same operations on the same memory, without Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import shim_backend
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_ema.ema import decay as ema
from fused_ema.step import stepper
from fused_ema.step.backends import graphs


class Graph(TorchDispatchMode):
    """Holds the operations of `with graph.capture(opt): opt.step()`."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.monkeypatch = monkeypatch
        self.calls: list[Callable[[], None]] = []

    def capture(self, opt: Any) -> None:
        with self.monkeypatch.context() as patch:
            patch.setattr(graphs, "is_capturing", lambda device: True)
            # the mode stands for a device's driver, which sees kernels of all kinds
            patch.setattr(stepper, "dispatch_modes", lambda: 0)
            patch.setattr(ema, "check_range", unless_on_device(ema.check_range))
            launching = [p for p in opt._stepper.plans if hasattr(p, "_launch")]
            for plan in launching:
                patch.setattr(plan, "_launch", self.recorded(plan._launch))
                patch.setattr(plan, "_squares", self.recorded(plan._squares))
            for folder in (p._folder for p in launching if p._folder is not None):
                patch.setattr(folder, "_launch", self.recorded(folder._launch))
            for trust in (p._trust for p in launching if p._trust is not None):
                patch.setattr(trust, "_launch", self.recorded(trust._launch))
            for plan in (p for p in opt._stepper.plans if hasattr(p, "_plan")):
                for name in ("norm", "run"):
                    patch.setattr(plan, name, self.recorded_by_shim(getattr(plan, name)))
            with self:
                opt.step()

    def replay(self) -> None:
        for call in self.calls:
            call()

    def recorded(self, launch: Callable[..., None]) -> Callable[..., None]:
        return lambda **parts: self.calls.append(lambda: launch(**parts))

    def recorded_by_shim(self, launch: Callable[..., None]) -> Callable[..., None]:
        """A plan's in C++, whose kernels are recorded by the shim of CUDA."""

        def record(*given: Any) -> None:
            self.calls += shim_backend.captured(lambda: launch(*given))

        return record

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a capture cannot wait for the device")
        if func._schema.is_mutable:
            self.calls.append(lambda: func(*args, **kwargs))
            return written(func, args, kwargs)
        result = func(*args, **kwargs)
        inputs = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        made = [t for t in tensors(result) if t.untyped_storage().data_ptr() not in inputs]
        if made:
            self.calls.append(lambda: repeat(func, args, kwargs, result))
            for tensor in made:
                spoil(tensor)
        return result


def unless_on_device(check: Callable[..., None]) -> Callable[..., None]:
    """As a tensor here stands for one on a device, it is not looked at."""

    def checked(name: str, value: Any, *limits: float) -> None:
        if not isinstance(value, torch.Tensor):
            check(name, value, *limits)

    return checked


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation in place returns."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    changed = [a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
    values = [given[name] for name in changed]
    return values[0] if len(func._schema.returns) == 1 else None


def repeat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    for old, new in zip(tensors(result), tensors(func(*args, **kwargs)), strict=True):
        old.copy_(new)


def spoil(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.logical_not_()
