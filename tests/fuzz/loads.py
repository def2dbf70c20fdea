"""Random state dicts, valid and hostile: a load is whole, and what was loaded goes on."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from cases import warm_up
from optimizers import OPTIMIZERS
from torch import nn

from .snapshots import difference, snapshot


class Training:
    """A small network and its optimizer; equal seeds give equal bits."""

    def __init__(self, seed: int, backend: str | None = None) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
        self.model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).to(dtype)
        optimizer = rng.choice(tuple(OPTIMIZERS.values()))
        params = list(self.model.parameters())
        cut = rng.choice((2, len(params)))
        groups = [{"params": part} for part in (params[:cut], params[cut:]) if part]
        options: dict[str, Any] = {"lr": 1e-2, "kappa": rng.choice((1.0, 4.0))}
        options["ema_decay"] = rng.choice((None, 0.9, (0.9, 0.99), warm_up))
        options |= rng.choice(tuple(optimizer.settings.values()))
        if options["ema_decay"] is not None and rng.random() < 0.5:
            options |= {"model": self.model, "ema_buffers": rng.choice(("average", "copy"))}
        options["ema_every"] = rng.choice((1, 1, 2))
        options["master_weights"] = dtype == torch.bfloat16 and rng.random() < 0.6
        if dtype == torch.float32 and options["ema_every"] == 1:
            options["ema_format"] = rng.choice(("full", "full", "bf16", "delta"))
        options["backend"] = backend or rng.choice(("auto", "native", "foreach"))
        self.opt = optimizer.ours(groups, **options)
        self.advance(rng.randrange(1, 5), seed)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def set_gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)

    def advance(self, steps: int, seed: int) -> None:
        for step in range(steps):
            self.set_gradients(1000 * seed + step)
            self.opt.step()

    def snapshot(self) -> dict[str, Any]:
        return snapshot(self.opt, self.tensors)


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumes_bit_by_bit(seed: int) -> None:
    """A run that was saved and loaded into a new optimizer ends in the bits of one that was not."""
    rng = random.Random(seed)
    going, resumed = Training(seed), Training(seed)
    resumed.advance(rng.randrange(3), seed + 1)  # what it holds is to be replaced
    saved = going.opt.state_dict(), going.model.state_dict()
    state, weights = map(through_file if rng.random() < 0.5 else copy.deepcopy, saved)
    resumed.model.load_state_dict(weights)
    resumed.opt.load_state_dict(state)
    told = difference(resumed.snapshot(), going.snapshot())
    assert not told, f"loading does not give what was saved: {told}"
    for training in (going, resumed):
        training.advance(3, seed + 2)
    told = difference(resumed.snapshot(), going.snapshot())
    assert not told, f"after three steps: {told}"


ODD_NUMBERS = (math.nan, math.inf, -1.0, -3, "x", None, 1e400, [1.0], True, torch.ones(2))


def odd_tensor(rng: random.Random, like: torch.Tensor) -> Any:
    """Something in the place of a tensor."""
    makers: list[Callable[[], Any]] = [
        lambda: torch.empty((*like.shape, 2), dtype=like.dtype),
        lambda: torch.empty(like.shape, dtype=like.dtype, device="meta"),
        lambda: torch.ones(like.shape).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(like.shape), 0.1, 0, torch.qint8),
        lambda: torch.ones(like.shape, dtype=torch.complex64),
        lambda: "a tensor",
        lambda: None,
        lambda: [0.0],
    ]
    return rng.choice(makers)()


def damage(rng: random.Random, state: dict[str, Any]) -> str:
    """Change a state dict in place; says how."""
    kind = rng.choice(("field", "tensor", "buffers", "drop", "entry", "groups", "params"))
    group = rng.choice(state["param_groups"])
    entries = [entry for entry in state["state"].values() if isinstance(entry, dict) and entry]
    if kind == "field":
        name = rng.choice([key for key in group if key != "params"] + ["ema_waited", "ema_skips"])
        group[name] = rng.choice(ODD_NUMBERS)
        return f"param_groups[...][{name!r}] = {group[name]!r}"
    if kind == "tensor" and entries:
        entry = rng.choice(entries)
        name = rng.choice(list(entry))
        held = entry[name] if isinstance(entry[name], torch.Tensor) else torch.ones(())
        entry[name] = odd_tensor(rng, held)
        return f"state[...][{name!r}] = {type(entry[name]).__name__}"
    homes = [entry for entry in entries if "ema_buffers" in entry]
    if kind == "buffers" and homes:
        if rng.random() < 0.7:
            held = rng.choice(list(homes[0]["ema_buffers"].values()))
            name = rng.choice(list(held))
            held[name] = odd_tensor(rng, held[name])
            return f"ema_buffers[...][{name!r}] = {type(held[name]).__name__}"
        odd = ([], None, 3, [{}, {}, {}], {"x": 1}, {"0": 3}, {"0": {}, "9": {}})
        homes[0]["ema_buffers"] = rng.choice(odd)
        return f"ema_buffers = {homes[0]['ema_buffers']!r}"
    if kind == "drop":
        place = rng.choice([state, group, *entries])
        name = rng.choice(list(place))
        del place[name]
        return f"without {name!r}"
    if kind == "entry" and state["state"]:
        name = rng.choice(list(state["state"]))
        state["state"][name] = rng.choice((None, 3, "x", [], torch.ones(2)))
        return f"state[{name!r}] = {type(state['state'][name]).__name__}"
    if kind == "groups":
        state["param_groups"] = rng.choice(([], [*state["param_groups"], group], [3], None))
        return "param_groups"
    group["params"] = rng.choice(([], group["params"] * 2, None, [99]))
    return f"params = {group['params']!r}"


def loads_all_or_nothing(seed: int) -> None:
    """What is refused has changed nothing; what is accepted can be stepped and saved."""
    rng = random.Random(seed)
    training, untouched = Training(seed), Training(seed)
    other = Training(seed)
    other.advance(2, seed + 1)
    state = copy.deepcopy(other.opt.state_dict())
    how = damage(rng, state)
    before = training.snapshot()
    refusal = raised(lambda: training.opt.load_state_dict(state))
    if refusal is None:
        failure = raised(lambda: (training.advance(2, seed + 2), training.snapshot()))
        assert failure is None, f"accepted ({how}), and then {failure!r}"
        return
    told = difference(training.snapshot(), before)
    assert not told, f"refused ({how}: {refusal!r}), and changed {told}"
    for one in (training, untouched):
        one.advance(2, seed + 2)
    told = difference(training.snapshot(), untouched.snapshot())
    assert not told, f"refused ({how}: {refusal!r}), and steps otherwise: {told}"


def raised(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None
