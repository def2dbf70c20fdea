"""The slots in Python write the words, rows and counts of those in C++."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import twins
from optimizers import each_optimizer

from fused_ema import FusedScaledAdamW, _native
from fused_ema.step import buckets, layout
from fused_ema.step.backends import dense, words

SIZES = ((3, 4), (5,), (0, 2), (2, 1, 3), ())


class Fold:
    """Scalars that tell their group and step."""

    advances = (1.0, 2.5)

    def __init__(self, rate: float = 1.0) -> None:
        self.rate = rate

    def seed(self, group: int) -> int:
        return 77 + group

    def __call__(self, group: int, step: float | None):
        scalars = () if step is None else (self.rate, float(group), step)
        return scalars, (0.25, 0.5)


class Both:
    """The same tensors, but for the counters, in slots of both kinds."""

    def __init__(self, dtype=torch.float32, **changed) -> None:
        arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
        master = changed.get("master", False)
        state = changed.pop("state", arithmetic if master else dtype)
        average = changed.pop("average", arithmetic)
        self.params = [torch.nn.Parameter(torch.ones(s, dtype=dtype)) for s in SIZES]
        # dense, and in another order
        self.params.append(torch.nn.Parameter(torch.ones(4, 3, dtype=dtype).t()))
        self.params.append(torch.nn.Parameter(torch.ones(2, 3, 4, dtype=dtype).permute(2, 0, 1)))
        kinds = [arithmetic] * master + [state]
        held = [[torch.zeros_like(p, dtype=kind) for kind in kinds] for p in self.params]
        emas = [[torch.zeros_like(p, dtype=average) for _ in range(2)] for p in self.params]
        self.tensors = held, emas
        self.steps = [[torch.zeros((), dtype=torch.float64) for _ in self.params] for _ in range(2)]
        fields = {"frozen": False, "takes_grads": True, "capturable": False}
        fields |= {"master": False, **changed}
        count = len(self.params)
        self.slots = [
            kind(
                num_scalars=3,
                params=self.params,
                steps=steps,
                states=held,
                emas=emas,
                groups=[0, 0, 0, 1, 1, 1, 1],
                param_indices=list(range(10, 10 + count)),
                **fields,
            )
            for kind, steps in zip((_native.Slots, words.Slots), self.steps, strict=True)
        ]

    def step(self, fold: Fold, packed: int | None = None) -> list[int]:
        """A step by both; the words, as far as they have changed, and all else are the same."""
        assert [slots.prepare(fold) for slots in self.slots] == [True, True]
        versions = []
        found = []
        for slots, steps in zip(self.slots, self.steps, strict=True):
            before = self.versions()
            slots.begin()
            with slots.hold():
                changed = slots.num_changed
                host = torch.full((changed if packed is None else packed,), -1)
                slots.pack(host)
                assert slots.num_changed == 0
                slots.advance()
            versions.append([now - then for now, then in zip(self.versions(), before, strict=True)])
            chunks = slots.chunks(4)
            assert chunks.dtype == torch.int32
            offsets = [c - s.data_ptr() for c, s in zip(slots.counters, steps, strict=True)]
            seen = (slots.num_words, slots.num_rows, slots.num_slots, offsets)
            seen += (tuple(slots.word_layout), tuple(slots.slot_layout))
            found.append((changed, host.tolist(), chunks.tolist(), *seen))
        assert found[0] == found[1]
        assert versions[0] == versions[1]
        assert self.steps[0] == self.steps[1]
        return [found[0][0], found[0][3]]

    def versions(self) -> list[int]:
        return [
            t._version for t in (*self.params, *(t for h in self.tensors for r in h for t in r))
        ]

    def set_gradients(self) -> list[torch.Tensor | None]:
        old = [p.grad for p in self.params]
        for p in self.params:
            p.grad = torch.ones_like(p)
        return old  # kept, so that no address is used again


KINDS = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "half precision": {"dtype": torch.float16},
    "master": {"dtype": torch.bfloat16, "master": True},
    "rounded states": {"state": torch.bfloat16},
    "rounded averages": {"average": torch.bfloat16},
    "differences": {"average": torch.float16},
    "capturable": {"capturable": True},
    "averages alone": {"takes_grads": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_those_of_the_extension(kind):
    both = Both(**KINDS[kind])
    both.set_gradients()
    changed, total = both.step(Fold())
    assert changed == total
    both.step(Fold())
    both.step(Fold(0.5))
    kept = both.set_gradients()
    both.step(Fold(0.5))
    both.params[1].grad = None  # another row
    both.step(Fold(0.5))
    kept.append(both.params[0].data)
    both.params[0].data = both.params[0].data.clone()
    both.step(Fold(0.5))
    both.params[3].grad = torch.ones(6).as_strided((2, 1, 3), (3, 7, 1)).to(both.params[3].dtype)
    both.step(Fold(0.5), packed=7)  # more or fewer words than have changed
    both.step(Fold(0.25), packed=500)
    assert len(kept) == len(both.params) + 1


def test_another_default_device_does_not_matter():
    both = Both()
    both.set_gradients()
    with torch.device("meta"):
        assert all([slots.prepare(Fold()) for slots in both.slots])
        hosts = [
            torch.zeros(slots.num_words, dtype=torch.int64, device="cpu") for slots in both.slots
        ]
        for slots, host in zip(both.slots, hosts, strict=True):
            slots.pack(host)
            assert slots.chunks(4).is_cpu
    assert torch.equal(*hosts)


def test_counts_are_taken_back_alike():
    both = Both()
    both.set_gradients()
    both.params[2].grad = None
    both.step(Fold())
    both.step(Fold())
    for steps in both.steps:
        steps[1].fill_(9.0)  # by somebody else
    for slots in both.slots:
        slots.uncount()
    assert [step.item() for step in both.steps[0]] == [1.0, 9.0, 0.0, 2.5, 2.5, 2.5, 2.5]
    assert both.steps[0] == both.steps[1]


def set_data(param, value):
    param.data = value


CHANGES = {
    "dtype": lambda both: set_data(both.params[0], both.params[0].data.double()),
    "shape": lambda both: set_data(both.params[0], torch.ones(13)),
    "permutation": lambda both: set_data(both.params[6], torch.ones(3, 4, 2).permute(1, 2, 0)),
    "order": lambda both: set_data(both.params[5], torch.ones(3, 4)),
    "dimensions": lambda both: set_data(both.params[0], torch.ones(12)),
    "state": lambda both: both.tensors[0][1][0].resize_(2),
    "average": lambda both: set_data(both.tensors[1][1][0], torch.zeros(5).double()),
    "counter": lambda both: [set_data(steps[0], torch.zeros(2).double()) for steps in both.steps],
    "nothing": lambda both: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_lies_otherwise_is_seen_alike(change):
    both = Both()
    both.set_gradients()
    both.step(Fold())
    both.params[0].grad = both.params[5].grad = both.params[6].grad = None
    CHANGES[change](both)
    same = change == "nothing"
    assert [slots.prepare(Fold()) for slots in both.slots] == [same, same]


def test_errors_are_alike():
    both = Both()
    both.set_gradients()
    both.params[0].data.untyped_storage().resize_(4)
    told = []
    for slots in both.slots:
        with pytest.raises(RuntimeError, match="has a storage that is too small") as error:
            slots.prepare(Fold())
        told.append(str(error.value))
    assert told[0] == told[1]
    both = Both(frozen=True)
    assert [slots.prepare(Fold()) for slots in both.slots] == [True, True]
    both.set_gradients()
    assert [slots.prepare(Fold()) for slots in both.slots] == [False, False]
    both = Both()
    both.set_gradients()
    for slots in both.slots:
        assert slots.prepare(Fold())
        with slots.hold(), pytest.raises(RuntimeError, match="under way in another thread"):
            slots.prepare(Fold())
        both.params[0].data = torch.ones(3)
        with pytest.raises(RuntimeError, match="replaced or resized while"):
            slots.begin()
        both.params[0].data = torch.ones(3, 4)
        slots.release()
        with pytest.raises(RuntimeError, match="dropped by another"):
            slots.begin()
    for kind in ({"dtype": torch.complex64}, {"state": torch.float16}):
        with pytest.raises(ValueError, match="no kernel"):
            Both(**kind)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"master_weights": True}, {"ema_format": "bf16", "state_format": "bf16"}],
    ids=str,
)
@each_optimizer
def test_triton_steps_to_the_same_bits(optimizer, kwargs, monkeypatch):
    dtype = torch.bfloat16 if "master_weights" in kwargs else torch.float32
    found = []
    for why_not in (None, "not wanted"):
        monkeypatch.setattr(dense, "why_not", why_not)
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, dtype=dtype)) for n in (7, 1030)]
        shared = {"lr": 0.1, "ema_decay": 0.9, "max_grad_norm": 1.0, **optimizer.options}
        opt = optimizer.ours(params, backend="triton", **shared, **kwargs)
        for k in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            if k == 1:
                params[0].grad = None
            opt.step()
        (plan,) = opt._stepper.plans
        assert type(plan._slots) is (_native.Slots if why_not is None else words.Slots)
        found.append([*params, *(t for p in params for t in opt.state[p].values())])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_more_slots_than_an_index_tells_apart_are_refused_and_shared_out(monkeypatch):
    count = layout.MOST_SLOTS + 1
    one, none = [torch.ones(1)] * count, [[]] * count
    for kind in (_native.Slots, words.Slots):
        with pytest.raises(ValueError, match="received 65537 tensors; allowed: 65536"):
            kind(0, False, True, False, False, one, one, none, none, [0] * count, [0] * count)
    monkeypatch.setattr(buckets, "MOST_SLOTS", 3)
    params, others = (twins.parameters([(5,)] * 7, torch.float32) for _ in "pq")
    opts = [
        FusedScaledAdamW(p, ema_decay=0.9, max_grad_norm=0.1, backend="native")
        for p in (params, others)
    ]
    twins.set_gradients(0, params, others)
    opts[0].step()
    monkeypatch.undo()
    opts[1].step()
    assert [len(opt.backends) for opt in opts] == [3, 1]
    twins.assert_same(*opts, rtol=0.0, atol=0.0)


def test_the_words_of_a_large_vision_transformer_fit_into_a_small_launch():
    shapes = json.loads((Path(__file__).parents[1] / "bench/shapes.json").read_text())["vit_l16"]
    layouts = layout.words(2 * 8, len(shapes))
    # two groups of AdamW with an average; of 4096 bytes, 88 are the task
    assert layouts.slots <= (4096 - 88) // 8
    assert layouts.grads - layouts.indices == len(shapes) // 4
