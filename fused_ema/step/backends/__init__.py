"""What runs a bucket: a backend says what it cannot do and plans the rest.

A backend is a module with ``NAME``, ``unsupported(bucket) -> reason | None`` and
``plan(bucket) -> Plan``. ``backend="auto"`` takes the first of :data:`BACKENDS` that can.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias

from ..buckets import Bucket
from . import foreach, native, reference, triton
from .plan import Plan


class Backend(Protocol):
    """What every backend module offers."""

    NAME: str

    def unsupported(self, bucket: Bucket) -> str | None:
        """Why this backend cannot run the bucket, None if it can."""

    def plan(self, bucket: Bucket) -> Plan:
        """Prepare the bucket for stepping."""


BACKENDS: tuple[Backend, ...] = (native, triton, foreach, reference)
BackendName: TypeAlias = Literal["auto", "native", "triton", "foreach", "reference"]


def select(bucket: Bucket) -> Backend:
    """The backend asked for, or the first that can run the bucket.

    Raises:
        RuntimeError: none can; the message gives each one's reason. Or the rule takes norms of
            parameters of which no process holds the whole.
    """
    requested, sharding = bucket.key.backend, bucket.key.sharding
    if bucket.rule.takes_norms and sharding is not None and sharding.dims:
        raise RuntimeError(
            f"rule {bucket.rule.name!r} takes norms of whole parameters, and cannot step {bucket}, "
            "sharded over processes; allowed: parameters that every process holds, as under "
            "DistributedDataParallel"
        )
    candidates = [b for b in BACKENDS if requested in ("auto", b.NAME)]
    reasons = []
    for backend in candidates:
        reason = backend.unsupported(bucket)
        if reason is None:
            return backend
        reasons.append(f"{backend.NAME}: {reason}")
    raise RuntimeError(f"backend={requested!r} cannot step {bucket}: {'; '.join(reasons)}")


def requested_backend(group: Mapping[str, Any], backend: str) -> str:
    """The backend that torch's ``foreach``, ``fused`` and ``differentiable`` ask for.

    An explicit ``backend`` wins. Otherwise ``fused=True`` and None leave the choice open,
    ``foreach=True`` or ``fused=False`` means ``"foreach"``, both False torch's for-loop:
    ``"reference"``, and so does ``differentiable=True``.

    Raises:
        RuntimeError: flags that exclude each other, as in torch.
    """
    foreach, fused = group["foreach"], group["fused"]
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if fused and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if backend != "auto":
        return backend
    if group["differentiable"] or (foreach is False and fused is False):
        return "reference"
    return "foreach" if foreach or fused is False else "auto"
