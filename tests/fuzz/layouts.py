"""Random parameters, gradients and hyper-parameters, every step held against the oracle."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields, replace
from typing import Any

import harness
import numpy as np
import torch
from cases import CHUNK, cosine, warm_up
from optimizers import OPTIMIZERS, Optimizer
from oracles import OracleConfig, OracleState, initial_state, oracle_step
from tolerances import COMPUTE_OF, NORM, UNIT, assert_local
from torch.nn import Parameter

import fused_ema

from .snapshots import difference, snapshot

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float32, torch.float64, *HALVES)
BACKENDS = ("auto", "auto", "auto", "foreach", "reference")
DECAYS = (0.0, 0.5, 0.99, 1.0, 1 - 1e-6, warm_up, cosine)
SCALE = 8.0  # of an AMP step: a power of two, so that the oracle sees the same gradients
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def draw_parameter(rng: random.Random, dtype: torch.dtype) -> Parameter:
    """A parameter of any small shape, strides and storage offset; sometimes of several chunks."""
    shape = [rng.choice((0, 1, 2, 3, 5, 9)) for _ in range(rng.randrange(4))]
    kind = rng.choice(("plain", "plain", "offset", "gaps", "permuted", "channels_last", "large"))
    if kind == "channels_last":
        shape = [rng.choice((1, 2, 3, 5)) for _ in range(4)]
    if kind == "large" and rng.random() < 0.2:
        shape = [CHUNK + rng.randrange(-1, 70)]
    values = random_tensor(rng, shape)
    if kind == "gaps":
        whole = torch.zeros([*shape, 2], dtype=dtype)
        view = whole.select(-1, rng.randrange(2))
    elif kind == "offset":  # beside another one in the same storage
        start = rng.randrange(1, 5)
        whole = torch.zeros(start + values.numel() + 3, dtype=dtype)
        view = whole[start : start + values.numel()].view(shape)
    elif kind == "permuted":
        order = rng.sample(range(len(shape)), len(shape))
        view = torch.zeros([shape[d] for d in order], dtype=dtype)
        view = view.permute([order.index(d) for d in range(len(shape))])
    else:
        view = torch.zeros(shape, dtype=dtype)
    if kind == "channels_last":
        view = view.contiguous(memory_format=torch.channels_last)
    view.copy_(values)
    return Parameter(view)


def slices_of_one(rng: random.Random, dtype: torch.dtype) -> list[Parameter]:
    """Neighbours in one buffer, as of a flattened network."""
    sizes = [rng.randrange(1, 40) for _ in range(3)]
    whole = random_tensor(rng, [sum(sizes)]).to(dtype)
    return [Parameter(part) for part in whole.split(sizes)]


def random_tensor(rng: random.Random, shape: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draw_gradient(
    rng: random.Random, param: Parameter, factor: float, lazy: bool
) -> torch.Tensor | None:
    """Plain, with other strides than the parameter's, or None; ``lazy``: without memory, too."""
    kind = rng.choice(("plain", "plain", "contiguous", "gaps", "expanded", "none", "same", "zero"))
    if kind == "none":
        return None
    if kind == "zero" and lazy:
        return torch._efficientzerotensor(param.shape, dtype=param.dtype)
    if kind == "expanded":
        return torch.tensor(0.5 * factor, dtype=param.dtype).expand(param.shape)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    drawn = torch.from_numpy(harness.draw_gradient(param.numel(), generator))
    values = (drawn * factor).to(param.dtype).view(param.shape)
    if kind == "contiguous":
        return values
    if kind == "gaps":
        return torch.stack((values, values), -1).select(-1, 1)
    if kind == "same" and param.grad is not None and not is_shared(param.grad):
        return param.grad.copy_(values)
    return torch.empty_like(param, requires_grad=False).copy_(values)


def is_shared(grad: torch.Tensor) -> bool:
    """Whether a gradient cannot be written in place."""
    return grad._is_zerotensor() or any(
        size > 1 and stride == 0 for size, stride in zip(grad.shape, grad.stride(), strict=True)
    )


def draw_group(rng: random.Random, optimizer: Optimizer, averages: int) -> dict[str, Any]:
    """Hyper-parameters of a group; all of a kind that every rule and schedule can follow."""
    return {
        "lr": rng.choice((0.0, 1e-3, 1e-2)),
        "weight_decay": rng.choice((0.0, 0.1)),
        "maximize": rng.random() < 0.3,
        "kappa": rng.choice((0.5, 1.0, 1.0, 3.0, 8.0)),
        "ema_order": rng.choice(("after", "after", "before")),
        "ema_decay": tuple(rng.choice(DECAYS) for _ in range(averages)) or None,
        **optimizer.draw(rng),
    }


@dataclass
class Member:
    """A parameter, and the oracle's view of what the optimizer held after the last step."""

    param: Parameter
    group: dict[str, Any]
    held: OracleState
    waited: int = 0  # steps since the averages moved
    begun: bool = False
    mastered: bool = False  # a float32 copy holds the weight, and keeps it while that is frozen

    @property
    def cohort(self) -> harness.Cohort:
        return harness.Cohort((self.param,), 0, frozenset())


class Run:
    """An optimizer with random parameters, and their oracles."""

    def __init__(self, seed: int, lazy: bool = False, freezes: bool = False) -> None:
        self.rng = rng = random.Random(seed)
        self.lazy, self.freezes = lazy, freezes
        self.optimizer = rng.choice(tuple(OPTIMIZERS.values()))
        self.averages = rng.choice((0, 1, 1, 2, 3))
        self.every = rng.choice((1, 1, 1, 2, 3))
        self.max_norm = rng.choice((None, None, 0.5, 5.0))
        self.scaled = rng.random() < 0.3
        masters = rng.random() < 0.4
        self.steps = 0
        self.members: list[Member] = []
        groups = [self.make_group() for _ in range(rng.randrange(1, 4))]
        options: dict[str, Any] = {"backend": rng.choice(BACKENDS), "ema_every": self.every}
        if self.scaled:  # only who asks for torch's fused class is handed scaled gradients
            options |= {"backend": "auto", "fused": True}
        options |= {"max_grad_norm": self.max_norm, "master_weights": masters}
        self.opt = self.optimizer.ours(groups, **options)
        self.remember()

    def make_group(self) -> dict[str, Any]:
        rng = self.rng
        params = [draw_parameter(rng, rng.choice(DTYPES)) for _ in range(rng.randrange(1, 4))]
        if rng.random() < 0.3:
            params += slices_of_one(rng, rng.choice(DTYPES))
        group = draw_group(rng, self.optimizer, self.averages)
        if self.every > 1:
            # what a schedule is read at is told by test_ema_every.py
            decays = group["ema_decay"] or ()
            group["ema_decay"] = tuple(0.9 if callable(d) else d for d in decays) or None
        return {**group, "params": params}

    def remember(self) -> None:
        """Take parameters in that are new, with the clock of the first group."""
        known = {id(member.param) for member in self.members}
        clock = self.members[0].held.clock if self.members else 0.0
        for group in self.opt.param_groups:
            for p in group["params"]:
                if id(p) not in known:
                    state = initial_state(config_of(self.optimizer, group), harness.vector([p]))
                    self.members.append(Member(p, group, replace(state, clock=clock)))

    def change(self) -> None:
        """What a user may do between two steps."""
        rng, action = self.rng, self.rng.random()
        member = rng.choice(self.members)
        if action < 0.15 and self.every == 1:
            self.opt.kappa = rng.choice((0.5, 1.0, 2.5))
        elif action < 0.25:
            rng.choice(self.opt.param_groups)["lr"] = rng.choice((1e-3, 3e-2))
        elif action < 0.4 and self.freezes:
            member.param.requires_grad_(not member.param.requires_grad)
        elif action < 0.5 and len(self.members) < 16:
            self.opt.add_param_group(self.make_group())
            self.remember()
        elif action < 0.6:
            torch.set_num_threads(rng.choice((1, 2)))
        elif action < 0.7 and self.steps:
            self.read()

    def read(self) -> None:
        """Saving and looking at an average change nothing."""
        before = self.snapshot()
        if self.averages:
            with self.opt.ema_weights(self.rng.randrange(self.averages)):
                pass
        told = difference(self.snapshot(), before)
        assert not told, f"a read changes {told}"

    def snapshot(self) -> dict[str, Any]:
        return snapshot(self.opt, [member.param for member in self.members])

    def step(self) -> None:
        """Set gradients, step, and hold all that is stored against the oracle."""
        factor = SCALE if self.scaled else 1.0
        for member in self.members:
            frozen = not member.param.requires_grad
            grad = None if frozen else draw_gradient(self.rng, member.param, factor, self.lazy)
            member.param.grad = grad
        if self.scaled:
            self.opt.grad_scale = torch.tensor(SCALE)
            self.opt.found_inf = torch.tensor(0.0)
            if all(member.begun for member in self.members) and self.rng.random() < 0.2:
                self.skip()
        given = [stored_gradient(m.param, factor) for m in self.members]
        self.opt.step()
        self.steps += 1
        taken = self.clipped(given, factor)
        for member, grad in zip(self.members, taken, strict=True):
            self.check(member, grad)

    def skip(self) -> None:
        """A step whose gradients overflowed changes nothing, and is not counted."""
        before = self.snapshot()
        self.opt.found_inf.fill_(1.0)
        self.opt.step()
        told = difference(self.snapshot(), before)
        assert not told, f"a step with found_inf changes {told}"
        self.opt.found_inf = torch.tensor(0.0)

    def clipped(self, given: list[Any], factor: float) -> list[Any]:
        """The gradients as the rule takes them; the norm is held against an exact one."""
        if self.max_norm is None:
            return given
        exact = math.sqrt(sum(float(np.square(g).sum()) for g in given if g is not None))
        unit = max(UNIT[COMPUTE_OF[member.param.dtype]] for member in self.members)
        norm = float(self.opt.grad_norm)
        assert abs(norm - exact) <= NORM * unit * exact, f"norm {norm!r}, expected {exact!r}"
        coefficient = min(1.0, self.max_norm / (norm + 1e-6)) / factor
        return [
            None if grad is None else times(grad * factor, coefficient, member.param.dtype)
            for grad, member in zip(given, self.members, strict=True)
        ]

    def check(self, member: Member, grad: np.ndarray | None) -> None:
        member.waited, member.begun = member.waited + 1, True
        due = self.steps % self.every == 0
        config = config_of(self.optimizer, member.group)
        decays = tuple(
            decay if self.every == 1 else decay**member.waited if due else 1.0
            for decay in config.ema_decay
        )
        config = replace(config, ema_decay=decays)
        member.waited = 0 if due else member.waited
        before = member.held
        after = oracle_step(config, before, grad)
        if not member.param.numel():
            member.held = after  # which of its states there are tells nothing
            return
        actual = harness.synchronised(self.opt, member.cohort, after, config)
        storage = member.param.dtype
        master = self.opt.state[member.param].get("master")
        assert master is not None or not member.mastered, "a master is gone"
        member.mastered = master is not None
        if master is not None:
            assert torch.equal(member.param, master.to(storage)), "a weight is not its master"
            actual, storage = replace(actual, param=harness.vector([master])), master.dtype
        member.held = actual
        about = f"{tuple(member.param.shape)} {member.param.stride()} {member.param.dtype}"
        assert_local(config, before, grad, actual, storage, f"step {self.steps}, {about}")


def times(grad: np.ndarray, factor: float, dtype: torch.dtype) -> np.ndarray:
    compute = NUMPY[COMPUTE_OF[dtype]]
    return (grad.astype(compute) * compute(factor)).astype(np.float64)


def stored_gradient(param: Parameter, factor: float) -> np.ndarray | None:
    """What the gradient is before it was scaled, as one vector."""
    if param.grad is None:
        return None
    return harness.vector([param.grad.clone()]) / factor


def config_of(optimizer: Optimizer, group: dict[str, Any]) -> OracleConfig:
    known = {field.name for field in fields(optimizer.oracle)}
    return optimizer.config({key: value for key, value in group.items() if key in known})


def follow(run: Run) -> None:
    """Every stored value is the oracle's step from the last ones, within roundings."""
    threads = torch.get_num_threads()
    try:
        for _ in range(run.rng.randrange(2, 9)):
            run.change()
            run.step()
    finally:
        torch.set_num_threads(threads)


def steps(seed: int) -> None:
    """Parameters and gradients in any memory."""
    follow(Run(seed))


def lazy_gradients(seed: int) -> None:
    """Gradients without memory, too."""
    follow(Run(seed, lazy=True))


def freezing(seed: int) -> None:
    """Parameters that are frozen and thawed."""
    follow(Run(seed, freezes=True))


def early_reads(seed: int) -> None:
    """State begins at the first step, from the weights as they are then, whatever was read."""
    run = Run(seed)
    run.read()
    with torch.no_grad():
        for member in run.members:
            member.param.add_(1.0)
            member.held = initial_state(
                config_of(run.optimizer, member.group), harness.vector([member.param])
            )
    follow(run)


def refuses_before_anything_moves(seed: int) -> None:
    """Weights that share their elements are refused, and the others stay where they are."""
    rng = random.Random(seed)
    others = [draw_parameter(rng, rng.choice(DTYPES)) for _ in range(3)]
    bad = Parameter(torch.ones(1).expand(rng.randrange(2, 9)))
    params = [*others, bad]
    rng.shuffle(params)
    before = [p.detach().clone() for p in params]
    try:
        opt = fused_ema.FusedScaledSGD(params, lr=0.1, ema_decay=0.9, backend=rng.choice(BACKENDS))
        for p in params:
            p.grad = torch.ones(p.shape, dtype=p.dtype)
        opt.step()
    except (RuntimeError, ValueError):
        assert all(map(torch.equal, before, params)), "refused, but others have moved"
    else:
        raise AssertionError("a parameter of stride 0 was accepted")
