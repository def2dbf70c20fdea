"""What an optimizer and its weights hold, to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


def bits(value: Any) -> Any:
    """A value with tensors as their bytes; equal values are equal bit by bit."""
    if isinstance(value, torch.Tensor):
        flat = torch.empty(value.numel(), dtype=value.dtype).copy_(value.detach().reshape(-1))
        content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return str(value.dtype), tuple(value.shape), content
    if isinstance(value, Mapping):
        return {key: bits(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [bits(v) for v in value]
    return value if isinstance(value, str | int | type(None)) else repr(value)


def snapshot(optimizer: Any, tensors: Iterable[torch.Tensor]) -> dict[str, Any]:
    """The weights (and buffers), and the state dict."""
    return {"weights": bits(list(tensors)), "state_dict": bits(optimizer.state_dict())}


def difference(found: Any, expected: Any, path: str = "") -> str:
    """Where two snapshots differ first; empty where they do not."""
    if isinstance(found, dict) and isinstance(expected, dict):
        if found.keys() != expected.keys():
            return f"{path}: keys {sorted(map(str, found))}, not {sorted(map(str, expected))}"
        pairs = [(key, found[key], expected[key]) for key in found]
    elif isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            return f"{path}: {len(found)} entries, not {len(expected)}"
        pairs = list(zip(range(len(found)), found, expected, strict=True))
    else:
        return "" if found == expected else f"{path}: {short(found)}, not {short(expected)}"
    for key, a, b in pairs:
        if told := difference(a, b, f"{path}[{key!r}]"):
            return told
    return ""


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
