"""Hypothesis: whatever the shapes, strides, alignments and groups, the backends agree."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from fused_ema import FusedScaledAdam, FusedScaledSGD

SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@st.composite
def tensors(draw) -> torch.Tensor:
    """A tensor of any small shape that starts anywhere in its storage, in any memory order."""
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    order = draw(st.permutations(range(len(shape))))
    gap = draw(st.sampled_from([1, 1, 1, 2]))
    offset = draw(st.integers(0, 5))
    sizes = [shape[d] for d in order]
    numel = torch.Size(sizes).numel()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    storage = torch.randn(offset + gap * numel, generator=generator).to(dtype)
    dense = storage[offset::gap][:numel].view(sizes)
    return dense.permute([order.index(d) for d in range(len(shape))])


@st.composite
def groups(draw) -> list[tuple[list[torch.Tensor], float, tuple[float, ...], float]]:
    """Tensors, lr, EMA decays and kappa of each of a few param groups."""
    group = st.tuples(
        st.lists(tensors(), min_size=1, max_size=4),
        st.sampled_from([0.0, 0.01, 0.5]),
        st.lists(st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]), max_size=3).map(tuple),
        st.sampled_from([0.5, 1.0, 3.0, 8.0]),
    )
    return draw(st.lists(group, min_size=1, max_size=4))


def with_strides_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same offset and gaps, in storage of its own."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = torch.empty(size, dtype=tensor.dtype)
    storage.copy_(torch.as_strided(tensor, (size,), (1,), 0))
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def run(cls, backend: str, spec, grads, **kwargs):
    """Three steps; returns every parameter's storage and state."""
    params = [[nn.Parameter(with_strides_of(t)) for t in group[0]] for group in spec]
    optimizer = cls(
        [
            {"params": p, "lr": lr, "ema_decay": decays or None, "kappa": kappa}
            for p, (_, lr, decays, kappa) in zip(params, spec, strict=True)
        ],
        backend=backend,
        **kwargs,
    )
    flat = [p for group in params for p in group]
    for step in grads:
        for p, grad in zip(flat, step, strict=True):
            p.grad = grad
        optimizer.step()
    return [(p.detach(), optimizer.state[p]) for p in flat]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    # one unit in the last place of the stored format: both round the same fp32 arithmetic,
    # whose own differences (fused multiply-adds in torch's loops) are far below it for halves
    eps = torch.finfo(a.dtype).eps
    scale = 16.0 if a.dtype in (torch.float32, torch.float64) else 2.0
    torch.testing.assert_close(a, b, rtol=scale * eps, atol=scale * eps)


@SETTINGS
@given(spec=groups(), data=st.data())
def test_native_agrees_with_the_reference(spec, data):
    cls, kwargs = data.draw(
        st.sampled_from(
            [
                (FusedScaledSGD, {"momentum": 0.9}),
                (FusedScaledSGD, {"weight_decay": 0.1, "maximize": True}),
                (FusedScaledAdam, {"eps": 1e-2}),
                (FusedScaledAdam, {"eps": 1e-2, "amsgrad": True, "weight_decay": 0.1}),
            ]
        )
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    count = sum(len(group[0]) for group in spec)
    present = st.lists(st.booleans(), min_size=count, max_size=count)
    shapes = [t for group in spec for t in group[0]]
    grads = [
        [
            torch.randn(t.shape, generator=generator).to(t.dtype) if here else None
            for t, here in zip(shapes, data.draw(present), strict=True)
        ]
        for _ in range(3)
    ]
    expected = run(cls, "reference", spec, grads, **kwargs)
    found = run(cls, "auto", spec, grads, **kwargs)
    for (p, state), (q, other) in zip(expected, found, strict=True):
        close(p, q)
        assert state.keys() == other.keys()
        for key in state:
            close(state[key], other[key])
        # what lies between the elements of a view with gaps is not the optimizer's
        whole, seen = (torch.as_strided(t, (t.storage_offset(),), (1,), 0) for t in (p, q))
        assert torch.equal(whole, seen)
