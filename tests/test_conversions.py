"""State is made and converted in blocks: nothing of a parameter's size is made on the way."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fused_ema import FusedScaledAdamW
from fused_ema.ema import formats
from fused_ema.step.state import ensure

BLOCK = 64
SHAPE = (8, 3, 16, 32)


class Allocated(TorchDispatchMode):
    """Counts the bytes of storages that operations make while they are alive.

    Attributes:
        peak: the most at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages = WeakIdKeyDictionary()
        self._known = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for given in tree_leaves((args, kwargs or {})):
            if isinstance(given, torch.Tensor):
                storage = given.untyped_storage()
                if storage not in self._storages:
                    self._known[storage] = True
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.untyped_storage() not in self._known:
                self._storages[made.untyped_storage()] = made.untyped_storage().nbytes()
        self.peak = max(self.peak, self.live())
        return result

    def live(self) -> int:
        return sum(self._storages.values())


def parameter(dtype, layout: str = "contiguous") -> nn.Parameter:
    torch.manual_seed(0)
    weight = torch.randn(SHAPE).to(dtype)
    if layout == "channels_last":
        weight = weight.to(memory_format=torch.channels_last)
    if layout == "gaps":
        weight = torch.cat([weight, weight], dim=-1)[..., ::2]
    return nn.Parameter(weight)


def above_what_remains(param, state, teacher=None, **options) -> int:
    """Peak of completing a state, in bytes beyond what it has at last."""
    opt = FusedScaledAdamW([param], ema_decay=0.9, **options)
    with Allocated() as allocated, torch.no_grad():
        ensure(opt.rule, opt.param_groups[0], param, state, teacher)
        return allocated.peak - allocated.live()


# Bytes of a few float32 tensors of one block.
ALLOWED = 8 * BLOCK * 4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps"])
@pytest.mark.parametrize("form", ["full", "bf16", "delta"])
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_begins_without_copies(dtype, master, form, layout, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", BLOCK)
    param, state = parameter(dtype, layout), {}
    extra = above_what_remains(param, state, master_weights=master, ema_format=form)
    assert extra <= ALLOWED
    read = formats.average(state["ema"], param.detach())
    assert torch.equal(read.float(), param.detach().float().to(read.dtype).float())


def test_a_teachers_average_begins_without_copies(monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", BLOCK)
    param = parameter(torch.float32)
    teacher = (param.detach() + torch.randn(SHAPE) * (torch.rand(SHAPE) < 0.5)).bfloat16()
    held, state = teacher.clone(), {}
    assert above_what_remains(param, state, teacher, ema_format="bf16") <= ALLOWED
    assert torch.equal(teacher, held)
    assert state["ema"] is teacher


@pytest.mark.parametrize("old", ["full", "bf16", "delta"])
@pytest.mark.parametrize("new", ["full", "bf16", "delta"])
def test_a_format_is_converted_in_blocks(old, new, monkeypatch):
    param, ema = parameter(torch.bfloat16), torch.randn(SHAPE)
    state = {"ema": formats.stored(ema, param.detach(), old)}
    read = formats.average(state["ema"], param.detach())
    expected = formats.stored(read.float(), param.detach(), new)
    monkeypatch.setattr(formats, "BLOCK", BLOCK)
    assert above_what_remains(param, state, ema_format=new) <= ALLOWED
    assert state["ema"].dtype == expected.dtype
    assert torch.equal(state["ema"], expected)


@pytest.mark.parametrize("old", ["full", "bf16"])
@pytest.mark.parametrize("far", [65.0, float("inf"), float("nan")])
def test_an_average_that_a_difference_cannot_hold_is_not_cut_off(old, far):
    param = torch.nn.Parameter(torch.zeros(3))
    trained = FusedScaledAdamW([param], ema_decay=0.9, ema_format=old)
    param.grad = torch.ones(3)
    trained.step()
    trained.state[param]["ema"][1] = far
    other = FusedScaledAdamW([param], ema_decay=0.9, ema_format="delta")
    other.load_state_dict(trained.state_dict())
    before = param.detach().clone()
    with pytest.raises(ValueError, match=r"state 'ema' is up to .* from the weights; allowed: 64"):
        other.step()
    assert torch.equal(param.detach(), before)
    assert other.state[param]["step"] == 1.0


def test_averages_that_rest_are_converted_in_blocks(monkeypatch):
    param = parameter(torch.bfloat16)
    ema = torch.randn(SHAPE)
    state = {"ema": formats.stored(ema, param.detach(), "delta")}
    expected = formats.average(state["ema"], param.detach())
    monkeypatch.setattr(formats, "BLOCK", BLOCK)
    opt = FusedScaledAdamW([param])
    with Allocated() as allocated, torch.no_grad():
        ensure(opt.rule, opt.param_groups[0], param, state)
        assert allocated.peak - allocated.live() <= ALLOWED
    assert torch.equal(state["ema"], expected)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (64,), (65,), (1, 1000), (7, 11, 13), SHAPE])
def test_blocks_are_small_and_see_each_element_once(shape, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", BLOCK)
    seen, other = (
        torch.zeros(shape),
        torch.ones(shape[::-1]).permute(tuple(range(len(shape)))[::-1]),
    )
    for part, same in formats.blocks(seen, other):
        assert part.shape == same.shape
        assert part.numel() <= BLOCK
        part.add_(same)
    assert torch.equal(seen, torch.ones(shape))


def test_tensors_of_different_shapes_have_no_blocks():
    with pytest.raises(ValueError, match=r"\(2,\), \(2, 1\).*allowed: one shape"):
        next(formats.blocks(torch.zeros(2), torch.zeros(2, 1)))


@pytest.mark.parametrize("where", [0, 70, 199])
def test_the_largest_distance_is_that_of_all_blocks(where, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", BLOCK)
    value, param = torch.zeros(200), torch.zeros(200)
    for far, message in ((100.0, "up to 100 from"), (float("nan"), "up to nan from")):
        value[where] = far
        with pytest.raises(ValueError, match=message):
            formats.check_distance("it", value, param)
