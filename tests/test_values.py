"""What numbers, sequences and flags may be given as: they enter as Python's own."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from fused_ema import (
    CosineDecay,
    FusedEMA,
    FusedScaledAdam,
    FusedScaledAdamW,
    FusedScaledSGD,
    PowerDecay,
)


class Listed(Sequence):
    """A sequence that is no list, as OmegaConf's."""

    def __init__(self, *values) -> None:
        self.values = values

    def __getitem__(self, index):
        return self.values[index]

    def __len__(self) -> int:
        return len(self.values)


NUMBERS = [np.float64, Fraction, Decimal, np.array, lambda x: np.array([x])]
PAIRS = [
    Listed(0.5, 0.75),
    [0.5, 0.75],
    np.array([0.5, 0.75]),
    np.array([0.5, 0.75], dtype=np.float32),
    (np.float32(0.5), Fraction(3, 4)),
    torch.tensor([0.5, 0.75]),
    (value for value in (0.5, 0.75)),
]


def parameter(value: float = 1.0) -> nn.Parameter:
    p = nn.Parameter(torch.full((3,), value))
    p.grad = torch.full((3,), 0.5)
    return p


def plain(value) -> bool:
    """Whether a value is Python's own, in tuples and lists too."""
    if type(value) in (tuple, list):
        return all(map(plain, value))
    return type(value) in (float, int, bool, str, type(None))


def assert_plain(opt) -> None:
    for group in (opt.defaults, *opt.param_groups):
        held = {name: value for name, value in group.items() if name != "params"}
        assert {name: value for name, value in held.items() if not plain(value)} == {}
    saved = io.BytesIO()
    torch.save(opt.state_dict(), saved)
    saved.seek(0)
    opt.load_state_dict(torch.load(saved, weights_only=True))


def assert_like(opt, **options) -> None:
    """Two steps of ``opt`` are those of one that was given plain numbers."""
    twin = type(opt)([parameter()], **options)
    for each in (opt, twin):
        each.step()
        each.step()
    for p, q in zip(opt.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
        for key, value in twin.state[q].items():
            assert torch.equal(opt.state[p][key], value)


@pytest.mark.parametrize("number", NUMBERS)
def test_any_number_enters_as_a_float(number):
    names = {"lr": 0.5, "eps": 0.25, "weight_decay": 0.125, "kappa": 2.0, "ema_decay": 0.75}
    options = {name: number(value) for name, value in names.items()}
    opt = FusedScaledAdamW(
        [parameter()], **options, rounding_seed=np.int64(3), ema_every=np.int32(1)
    )
    assert opt.param_groups[0]["lr"] == 0.5
    assert type(opt.param_groups[0]["lr"]) is float
    assert type(opt.ema_every) is int
    assert_like(opt, **names, rounding_seed=3)
    assert_plain(opt)


@pytest.mark.filterwarnings("ignore:ema_decay=")  # of values that differ from the given
@pytest.mark.parametrize("field", ["betas", "ema_decay"])
@pytest.mark.parametrize("how", ["constructor", "group", "added", "loaded", "written", "read"])
@pytest.mark.parametrize("pair", PAIRS[:-1], ids=lambda pair: type(pair).__name__)
def test_any_sequence_of_two_is_a_pair(pair, how, field):
    pairs = {"betas": (0.9, 0.999), "ema_decay": (0.9, 0.8)}
    p, options = parameter(), {**pairs, field: pair}
    if how == "constructor":
        opt = FusedScaledAdam([p], **options)
    elif how == "group":
        opt = FusedScaledAdam([{"params": [p], field: pair}], **pairs)
    elif how == "added":
        opt = FusedScaledAdam([parameter()], **pairs)
        opt.add_param_group({"params": [p], field: pair})
        opt.param_groups.pop(0)
    elif how == "loaded":
        opt = FusedScaledAdam([p], **pairs)
        state_dict = opt.state_dict()
        state_dict["param_groups"][0][field] = pair
        opt.load_state_dict(state_dict)
    else:
        opt = FusedScaledAdam([p], **pairs)
        opt.param_groups[0][field] = pair
        if how == "read":
            assert len(opt.ema_state_dict(nn.ParameterList([p]), index=1)) == 1
    assert_like(opt, **{**pairs, field: (0.5, 0.75)})
    values = tuple(map(float, opt.param_groups[0][field]))
    assert values == (0.5, 0.75)
    written = how in ("written", "read") and isinstance(pair, tuple)  # stays as it was written
    if not isinstance(pair, torch.Tensor) and not written:
        assert_plain(opt)


@pytest.mark.parametrize("cls", [FusedScaledAdam, FusedScaledAdamW])
def test_a_generator_of_two_is_a_pair(cls):
    assert_like(cls([parameter()], betas=(b for b in (0.5, 0.75))), betas=(0.5, 0.75))


def test_several_averages_of_any_sequence():
    p = parameter()
    opt = torch.optim.SGD([p], lr=0.1)
    ema = FusedEMA(opt, Listed(np.float64(0.5), PowerDecay(1.0), CosineDecay(0.5, 10)))
    opt.step()
    assert ema.param_groups[0]["ema_decay"] == (0.5, PowerDecay(1.0), CosineDecay(0.5, 10))
    assert {"ema", "ema_1", "ema_2"} <= set(ema.state[p])


@pytest.mark.filterwarnings("ignore:ema_decay=")  # of values that differ from the given
def test_a_number_written_into_a_group_is_taken_at_the_next_step():
    opt = FusedScaledSGD([parameter()], lr=0.5, ema_decay=0.5)
    opt.step()
    twin = FusedScaledSGD([parameter()], lr=0.5, ema_decay=0.5)
    twin.step()
    opt.param_groups[0].update(lr=np.array([0.25]), ema_decay=np.float32(0.75))
    twin.param_groups[0].update(lr=0.25, ema_decay=0.75)
    opt.step()
    twin.step()
    (p,), (q,) = (each.param_groups[0]["params"] for each in (opt, twin))
    assert torch.equal(p, q)
    assert torch.equal(opt.state[p]["ema"], twin.state[q]["ema"])
    assert_plain(opt)


@pytest.mark.parametrize(
    "flag", ["amsgrad", "maximize", "master_weights", "decoupled_weight_decay"]
)
def test_a_flag_of_numpys_is_one_wherever_it_is_written(flag):
    opt, twin = (FusedScaledAdam([parameter()], weight_decay=0.5, ema_decay=0.5) for _ in range(2))
    opt.step()
    twin.step()
    opt.param_groups[0][flag] = np.bool_(True)
    twin.param_groups[0][flag] = True
    opt.kappa = twin.kappa = 2.0  # checks all of a group
    for each in (opt, twin):
        each.step()
        each.step()
    (p,), (q,) = (each.param_groups[0]["params"] for each in (opt, twin))
    assert torch.equal(p, q)
    assert_plain(opt)


def test_a_seed_of_numpys_gives_the_bits_of_pythons():
    options = {"ema_decay": 0.9, "ema_format": "bf16", "backend": "reference"}
    opt, twin = (FusedScaledSGD([parameter()], lr=0.1, **options) for _ in range(2))
    opt.param_groups[0]["rounding_seed"] = np.int32(7)
    twin.param_groups[0]["rounding_seed"] = 7
    for each in (opt, twin, opt, twin):
        each.step()
    (p,), (q,) = (each.param_groups[0]["params"] for each in (opt, twin))
    assert torch.equal(opt.state[p]["ema"], twin.state[q]["ema"])
    opt.param_groups[0]["lr"] = 0.2
    opt.param_groups[0]["ema_decay"] = (0.9,)
    opt.step()
    assert_plain(opt)


@pytest.mark.parametrize("value", [np.int64(2), np.array(2)])
def test_what_is_set_for_all_groups_becomes_a_number(value):
    opt = FusedScaledSGD([parameter()], lr=0.1, ema_decay=0.5)
    opt.ema_every = opt.max_grad_norm = value
    assert_plain(opt)
    assert opt.ema_every == opt.max_grad_norm == 2


def test_an_array_of_several_numbers_is_refused_by_name():
    with pytest.raises(ValueError, match=r"lr=array\(\[0.1, 0.2\]\) is not a number"):
        FusedScaledSGD([parameter()], lr=np.array([0.1, 0.2]))


def test_a_group_that_was_given_is_not_written():
    given = {"params": [parameter()], "betas": [0.5, 0.75], "note": [1]}
    opt = FusedScaledAdam([given])
    assert given["betas"] == [0.5, 0.75]
    assert opt.param_groups[0]["note"] == [1]


@pytest.mark.parametrize("empty", [[], (), Listed(), np.array([])], ids=lambda e: type(e).__name__)
def test_no_decay_at_all_is_none(empty):
    with pytest.raises(ValueError, match=r"ema_decay=\(\) is empty; allowed: .*None"):
        FusedScaledSGD([parameter()], ema_decay=empty)


@pytest.mark.parametrize(
    "betas", [(0.5,), Listed(0.5, 0.6, 0.7), 0.5, "ab", {0.5: 1, 0.6: 2}, None, torch.ones(3)]
)
def test_what_is_not_two_numbers_is_refused(betas):
    with pytest.raises(ValueError, match=r"betas"):
        FusedScaledAdam([parameter()], betas=betas)


@pytest.mark.parametrize(
    ("cls", "flag"),
    [
        (FusedScaledAdam, "amsgrad"),
        (FusedScaledAdam, "decoupled_weight_decay"),
        (FusedScaledSGD, "nesterov"),
        *((FusedScaledAdamW, f) for f in ("maximize", "capturable", "master_weights")),
        (FusedScaledSGD, "differentiable"),
    ],
)
def test_a_flag_is_true_or_false(cls, flag):
    for bad in ("yes", 2, 0.5, None, [True]):
        said = re.escape(f"{flag}={bad!r} is not known; allowed: True or False")
        with pytest.raises(ValueError, match=said):
            cls([parameter()], **{flag: bad})
    for good in (False, 0, np.bool_(False)):
        opt = cls([parameter()], **{flag: good})
        assert not opt.param_groups[0][flag]
        assert_plain(opt)
