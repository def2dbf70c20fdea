"""Matches the names of the same tensors in two modules, whatever wrappers either has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

# Names under which DistributedDataParallel, DataParallel, AveragedModel and timm's ModelEmaV3,
# torch.compile, FSDP1, activation checkpointing and Lightning Fabric keep the wrapped module.
WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)


def renamed(entries: Mapping[str, T], known: Iterable[str]) -> dict[str, T]:
    """``entries`` under the names that ``known`` has for the same tensors, in their order.

    Equal names match first. The rest match if their :func:`bare` names are equal. An entry without
    a counterpart keeps its name.
    """
    names = list(known)
    missing = set(names) - entries.keys()
    if not missing or entries.keys() <= set(names):
        return dict(entries)
    own = {short: name for name, short in bare(names).items() if name in missing}
    short = bare(entries)
    taken = set(names) - missing
    return {
        name if name in taken else own.get(short[name], name): value
        for name, value in entries.items()
    }


def bare(names: Iterable[str]) -> dict[str, str]:
    """Each of a module's names without the parts that wrappers have inserted.

    A part belongs to a wrapper if it is one of :data:`WRAPPERS` and has no sibling, because a
    wrapper holds nothing but the module inside. So different names stay different.
    """
    split = {name: tuple(name.split(".")) for name in names}
    children: dict[tuple[str, ...], set[str]] = {}
    for parts in split.values():
        for i, part in enumerate(parts):
            children.setdefault(parts[:i], set()).add(part)
    return {
        name: ".".join(
            part
            for i, part in enumerate(parts)
            if part not in WRAPPERS or len(children[parts[:i]]) > 1 or i == len(parts) - 1
        )
        for name, parts in split.items()
    }
