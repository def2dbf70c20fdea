"""Training steps under torch.compile: what eager ones give, and no compilation a step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import OPTIMIZERS
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

from fused_ema import (
    CosineDecay,
    FusedEMA,
    FusedScaledAdamW,
    FusedScaledSGD,
    PowerDecay,
    WarmUpDecay,
)

STEPS = 10
WARM_UP = 4  # until Dynamo has seen every branch twice, and which numbers change
BATCH = 8
CXX = os.environ.get("CXX", "g++")

CASES = {
    **{name: (o.ours, {**o.options, "ema_decay": 0.9}) for name, o in OPTIMIZERS.items()},
    "SGD-nesterov": (FusedScaledSGD, {"momentum": 0.9, "nesterov": True, "ema_decay": 0.9}),
    "AdamW": (FusedScaledAdamW, {"ema_decay": WarmUpDecay(0.99), "max_grad_norm": 0.5}),
    "AdamW-reference": (FusedScaledAdamW, {"ema_decay": 0.9, "backend": "reference"}),
    "AdamW-between": (
        FusedScaledAdamW,
        {"ema_decay": (PowerDecay(6.0), CosineDecay(0.9, 30.0)), "ema_every": 3, "amsgrad": True},
    ),
}

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
Body = Callable[["Training", int, Tensor, Tensor], Tensor]


class CountingBackend:
    """Runs what Dynamo captures as it is, and counts it."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


class Training:
    """A small network and its optimizer, whose lr changes at every step and kappa halfway."""

    def __init__(self, case: str = "AdamW", dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        # a bias before BatchNorm1d would have rounding errors for a gradient
        self.trunk = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh())
        self.head = nn.Linear(6, 3)
        self.model = nn.Sequential(self.trunk, self.head).to(dtype)
        self.dtype = dtype
        cls, options = CASES[case]
        shared = {"lr": 0.1, "weight_decay": 0.1, "kappa": 2.0, **options}
        self.opt = cls(self.model.parameters(), model=self.model, **shared)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.opt, lambda step: 1 / (1 + step))
        self.compilations: list[int] = []

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.model(x) - y).square().mean()

    def follow(self, step: Callable[[int, Tensor, Tensor], Tensor]) -> list[Tensor]:
        """All that the steps give, and what they leave."""
        generator = torch.Generator().manual_seed(1)
        given = []
        for index in range(STEPS):
            x, y = (torch.randn(BATCH, n, generator=generator, dtype=self.dtype) for n in (4, 3))
            if index == STEPS // 2:
                self.opt.kappa = 3.0
            given.append(step(index, x, y))
            self.scheduler.step()
            self.compilations.append(counters["frames"]["total"])
        return given + self.left()

    def left(self) -> list[Tensor]:
        averages = self.opt.ema_state_dict(self.model)
        states = [tensor for state in self.opt.state.values() for tensor in state.values()]
        held = (*self.model.state_dict().values(), *averages.values(), *states)
        return [tensor.clone() for tensor in held]


def train_step(training: Training, _: int, x: Tensor, y: Tensor) -> Tensor:
    loss = training.loss(x, y)
    loss.backward()
    training.opt.step()
    training.opt.zero_grad()
    return loss.detach()


def run(compile: Compile, body: Body = train_step, **options: Any) -> tuple[Training, list[Tensor]]:
    training = Training(**options)
    step = compile(lambda index, x, y: body(training, index, x, y))
    return training, training.follow(step)


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def with_backend(backend: str | Callable[..., Any]) -> Compile:
    return lambda function: torch.compile(function, backend=backend)


def assert_compiled_once(training: Training) -> None:
    assert training.compilations[0] > 0
    assert len(set(training.compilations[WARM_UP - 1 :])) == 1, training.compilations


def assert_same_as_eager(body: Body, compiler: str = "eager", **options: Any) -> None:
    _, expected = run(eager, body, **options)
    training, found = run(with_backend(compiler), body, **options)
    assert_compiled_once(training)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("case", "compiler"), [*((case, "eager") for case in CASES), ("AdamW", "aot_eager")]
)
def test_a_compiled_training_step(case, compiler):
    assert_same_as_eager(train_step, compiler, case=case)


@pytest.fixture
def inductor() -> Compile:
    if shutil.which(CXX) is None:
        pytest.skip(f"needs a C++ compiler: {CXX} is none")
    return with_backend("inductor")


def test_inductor(inductor):
    """Rounds sums its own way, in float64: 1e-16 a step, of which a wrong lr would be 1e-2."""
    _, expected = run(eager, dtype=torch.float64)
    training, found = run(inductor, dtype=torch.float64)
    assert_compiled_once(training)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_weights_come_back_from_compiled_code(inductor):
    """Where Inductor compiles ``k = a.clone(); a.copy_(b); b.copy_(k)``, ``a`` is lost."""
    training, _ = run(eager)
    before = training.left()

    def evaluate(x):
        with training.opt.ema_weights():
            return training.head.weight.sum() + x

    inductor(evaluate)(torch.ones(()))
    assert all(map(torch.equal, training.left(), before))


@pytest.mark.parametrize("bound", [True, False])
def test_a_compiled_step_alone_gives_the_compiler_nothing(bound):
    backend = CountingBackend()

    def body(step: Callable[[], Any]) -> Body:
        def train(training, index, x, y):
            loss = training.loss(x, y)
            loss.backward()
            step(training)
            training.opt.zero_grad(set_to_none=False)
            return loss.detach()

        return train

    _, expected = run(eager, body(lambda training: training.opt.step()))
    training = Training()
    step = training.opt.step if bound else lambda: training.opt.step()
    compiled = torch.compile(step, backend=backend)
    train = body(lambda _: compiled())
    found = training.follow(lambda index, x, y: train(training, index, x, y))
    assert all(map(torch.equal, found, expected))
    assert_compiled_once(training)
    assert backend.graphs == 0


def test_a_closure_is_compiled():
    backend = CountingBackend()

    def body(training, _, x, y):
        def closure():
            training.opt.zero_grad()
            loss = training.loss(x, y)
            loss.backward()
            return loss

        return training.opt.step(closure).detach()

    assert_same_as_eager(body)
    run(with_backend(backend), body)
    assert backend.graphs > 0


def test_gradients_that_are_none_at_some_steps():
    def body(training, index, x, y):
        features = training.trunk(x)
        loss = (training.head(features) - y if index % 2 else features).square().mean()
        loss.backward()
        training.opt.step()
        training.opt.zero_grad(set_to_none=True)
        return loss.detach()

    assert_same_as_eager(body)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_step_inside_a_context(context):
    def body(training, _, x, y):
        loss = training.loss(x, y)
        loss.backward()
        with context():
            training.opt.step()
            scaled = loss.detach() * 2.0
        training.opt.zero_grad()
        return scaled

    assert_same_as_eager(body)


def test_a_step_under_autocast():
    def body(training, index, x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return train_step(training, index, x, y)

    assert_same_as_eager(body)


def test_what_else_changes_inside():
    """A scheduler, the batch size and the norm that was clipped."""

    def body(training, index, x, y):
        opt = training.opt
        opt.kappa = x.shape[0] * (1 + index % 3) / BATCH
        loss = train_step(training, index, x, y)
        training.scheduler.step()
        return loss + opt.grad_norm + opt.kappa

    assert_same_as_eager(body)
    training, _ = run(with_backend("eager"), body)
    assert not training.opt.param_groups[0]["capturable"]


def test_two_optimizers_in_one_step():
    def body(training, index, x, y):
        loss = train_step(training, index, x, y)
        other = training.other
        (other.loss(x, y) * loss).backward()
        other.opt.step()
        other.opt.zero_grad()
        return loss

    def follow(compile):
        training = Training()
        training.other = Training("SGD")
        step = compile(lambda index, x, y: body(training, index, x, y))
        return training, training.follow(step) + training.other.left()

    _, expected = follow(eager)
    training, found = follow(with_backend("eager"))
    assert all(map(torch.equal, found, expected))
    assert_compiled_once(training)


def test_a_compiled_model_and_a_step_outside():
    _, expected = run(eager)
    training = Training()
    training.model = torch.compile(training.model, backend="eager")
    given = training.follow(lambda index, x, y: train_step(training, index, x, y))[:STEPS]
    assert_compiled_once(training)
    assert all(map(torch.equal, given, expected))


def test_hooks_are_called_once_a_step():
    training = Training()
    calls = []
    training.opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    training.opt.register_step_post_hook(lambda *_: calls.append("post"))
    step = torch.compile(train_step, backend="eager")
    training.follow(lambda index, x, y: step(training, index, x, y))
    assert calls == ["pre", "post"] * STEPS


def test_a_whole_graph_is_refused():
    training = Training()
    training.loss(torch.ones(BATCH, 4), torch.ones(BATCH, 3)).backward()
    before = training.left()
    with pytest.raises(Unsupported, match=r"Stepping\.(_take_)?step"):
        torch.compile(training.opt.step, backend="eager", fullgraph=True)()
    assert all(map(torch.equal, training.left(), before))


def test_a_step_inside_ema_weights_is_refused():
    training, _ = run(with_backend("eager"))
    before = training.left()
    step = torch.compile(training.opt.step, backend="eager")
    with training.opt.ema_weights(), pytest.raises(RuntimeError, match="inside ema_weights"):
        step()
    assert all(map(torch.equal, training.left(), before))


def test_averages_of_any_optimizer_follow_a_compiled_step():
    params, others = ([nn.Parameter(torch.ones(3))] for _ in "ab")
    compiled, plain = (torch.optim.SGD(p, lr=0.5, momentum=0.9) for p in (params, others))
    averages = [FusedEMA(opt, 0.5) for opt in (compiled, plain)]
    step = torch.compile(compiled.step, backend="eager")
    for _ in range(4):
        params[0].grad, others[0].grad = torch.ones(3), torch.ones(3)
        step()
        plain.step()
        found, expected = (
            e.state[p[0]]["ema"] for e, p in zip(averages, (params, others), strict=True)
        )
        assert torch.equal(found, expected)
