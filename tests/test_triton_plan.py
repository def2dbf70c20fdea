"""What a step of the Triton backend uploads: what has changed since the last, and no more."""

from __future__ import annotations

import pytest
import torch

from fused_ema import FusedScaledAdamW, FusedScaledSGD
from fused_ema.optim.stepping import Begun
from fused_ema.step.backends import dense
from fused_ema.step.backends.triton import DeviceWords

ROW = 7 + 1  # the rule's scalars and one average's weight


@pytest.fixture(autouse=True, params=["extension", "stand-in"])
def slots(request, monkeypatch) -> None:
    """Whose slots they are."""
    if request.param == "stand-in":
        monkeypatch.setattr(dense, "why_not", "not wanted")


@pytest.fixture
def uploads(monkeypatch) -> list[int]:
    """Words of every upload."""
    counts = []
    packed = DeviceWords._packed

    def counted(self, host):
        counts.append(len(host))
        return packed(self, host)

    monkeypatch.setattr(DeviceWords, "_packed", counted)
    return counts


def parameters(count: int = 3) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def words(params: int, states: int, rows: int = 1) -> int:
    # gradient; number of elements, index, and addresses of parameter, states and average
    return rows * ROW + indices(params) + params * (1 + 2 + 1 + states + 1)


def indices(params: int) -> int:
    """Words of the indices of rows, four in each."""
    return -(-params // 4)


def test_adam_uploads_its_scalars(uploads):
    opt = FusedScaledAdamW(parameters(), ema_decay=0.9, backend="triton")
    for _ in range(3):
        opt.step()
    assert uploads == [words(3, states=2), ROW, ROW]


def test_sgd_uploads_nothing_while_nothing_changes(uploads):
    opt = FusedScaledSGD(parameters(), 0.1, ema_decay=0.9, backend="triton")
    for _ in range(4):
        opt.step()
    assert uploads == [words(3, states=0)]


def test_new_gradients_upload_rows_and_gradients(uploads):
    params = parameters()
    opt = FusedScaledSGD(params, 0.1, ema_decay=0.9, backend="triton")
    opt.step()
    kept = [p.grad for p in params]  # so that the memory is not used again
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert uploads[1:] == [ROW + indices(3) + 3]
    assert len(kept) == 3


def test_new_memory_of_a_parameter_uploads_the_slots(uploads):
    params = parameters()
    opt = FusedScaledSGD(params, 0.1, ema_decay=0.9, backend="triton")
    opt.step()
    old = params[1].data
    params[1].data = torch.full((4,), 5.0)
    opt.step()
    assert uploads[1:] == [words(3, states=0)]
    assert torch.all(params[1] < 5.0)
    assert torch.all(old > 0.8)


def test_another_row_moves_everything(uploads):
    """A parameter without a gradient takes a row of its own."""
    params = parameters()
    opt = FusedScaledSGD(params, 0.1, ema_decay=0.9, backend="triton")
    opt.step()
    params[2].grad = None
    opt.step()
    opt.step()
    assert uploads[1:] == [words(3, states=0, rows=2)]


def memory(parts) -> set[int]:
    return {part.untyped_storage().data_ptr() for part in parts}


def test_a_capture_has_words_of_its_own():
    """Neither an eager step nor another capture writes where a graph reads."""
    params = parameters()
    opt = FusedScaledAdamW(params, ema_decay=0.9, backend="triton")
    opt.step()
    (plan,) = opt._stepper.plans
    words = plan._words
    eager = memory(words.current())
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    opt._prepared(Begun())
    first, second = words.captured(), words.captured()
    after = words.current()
    assert not eager & memory(first)
    assert not memory(first) & memory(second)
    assert not memory(after) & (memory(first) | memory(second))
    for part, other, third in zip(first, second, after, strict=True):
        assert torch.equal(part, other)
        assert torch.equal(part, third)
    assert memory(first) | memory(second) <= memory(words.kept)
    assert len(words.kept) == 4
    assert plan.captured
