"""Every rule is written in Python, C++ and Triton alike; variants are told apart by name alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import ALL_CASES
from optimizers import OF_RULE, each_optimizer

import fused_ema
from fused_ema import _native, rules
from fused_ema.kernels import rules as kernels
from fused_ema.kernels.interpreter import device, interpreted
from fused_ema.rules.rule import Rule, Values, directed

FUNCTIONS = {
    node.name: node
    for node in ast.parse(Path(kernels.__file__).read_text()).body
    if isinstance(node, ast.FunctionDef)
}
SPECIFIED = {
    name: {
        "scalars": list(rule.scalars._fields),
        "numbers": list(rule.number_names),
        "flags": list(rule.flag_names),
        "variants": {variant: len(states) for variant, states in rule.variants.items()},
    }
    for name, rule in rules.RULES.items()
}
# What belongs to a rule beside its specification in Python, by the name of the rule.
PARTS: dict[str, dict[str, Any]] = {
    "C++": {
        name: {
            "scalars": scalars,
            "numbers": _native.rule_numbers()[name],
            "flags": _native.rule_flags()[name],
            "variants": _native.rule_variants()[name],
        }
        for name, scalars in _native.rule_scalars().items()
    },
    "Triton": dict(kernels.RULES),
    "Triton's folds": dict(kernels.FOLDS),
    "tests": {"frozen": None, **OF_RULE},
}


def reached(name: str) -> Iterator[ast.FunctionDef]:
    """A function of the Triton rules and all that it calls there."""
    yield FUNCTIONS[name]
    for node in ast.walk(FUNCTIONS[name]):
        if isinstance(node, ast.Name) and node.id in FUNCTIONS and node.id != name:
            yield from reached(node.id)


def unpacked(fn: Any, source: str) -> list[list[str]]:
    """The names that a Triton function and those it calls give to the entries of a tuple."""
    return [
        [entry.id for entry in node.targets[0].elts]
        for function in reached(fn.__name__)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Name)
        and node.value.id == source
    ]


def returned(fn: Any) -> int:
    """How many values a Triton function returns."""
    (last,) = (node for node in ast.walk(FUNCTIONS[fn.__name__]) if isinstance(node, ast.Return))
    return len(last.value.elts)


def check_triton(rule: Rule, functions: Mapping[str, Any], fold: Any) -> None:
    """States, scalars and numbers of all variants are the record's, in its order."""
    assert functions.keys() == rule.variants.keys()
    scalars = rule.scalars._fields
    for variant, states in rule.variants.items():
        assert all(len(n) == len(states) for n in unpacked(functions[variant], "states"))
        assert bool(unpacked(functions[variant], "states")) == bool(states)
        names = unpacked(functions[variant], "scalars")
        assert bool(names) == bool(scalars)
        for given in names:
            pairs = zip(given, scalars, strict=True)
            assert all(own in ("_", name) for own, name in pairs)
    assert returned(fold) == len(scalars)
    if scalars:
        assert [len(names) for names in unpacked(fold, "numbers")] == [len(rule.number_names)]


def check_complete(parts: Mapping[str, Mapping[str, Any]], specified: Mapping[str, Any]) -> None:
    """A rule has each of the parts, and no part is without its rule."""
    for part, found in parts.items():
        assert found.keys() == specified.keys(), part
    assert parts["C++"] == specified
    for name, rule in rules.RULES.items():
        check_triton(rule, parts["Triton"][name], parts["Triton's folds"][name])


def test_every_rule_is_complete():
    check_complete(PARTS, SPECIFIED)
    assert kernels.TRUST.keys() == {name for name, rule in rules.RULES.items() if rule.takes_norms}
    assert {rule.number_names[-1] for rule in rules.RULES.values()} == {
        "kappa"
    }  # where kernels look


@pytest.mark.parametrize("name", [name for name in rules.RULES if name != "frozen"])
@pytest.mark.parametrize("part", PARTS)
def test_a_rule_without_a_part_is_noticed(part, name):
    found = {key: dict(value) for key, value in PARTS.items()}
    del found[part][name]
    with pytest.raises(AssertionError):
        check_complete(found, SPECIFIED)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_without_a_rule_is_noticed(part):
    found = {key: dict(value) for key, value in PARTS.items()}
    found[part]["lion"] = found[part]["sgd"]
    with pytest.raises(AssertionError):
        check_complete(found, SPECIFIED)


@pytest.mark.parametrize("field", SPECIFIED["adam"])
def test_a_cpp_table_that_differs_is_noticed(field):
    found = deepcopy(PARTS["C++"])
    table = found["adam"][field]
    if isinstance(table, dict):
        table["plain"] += 1
    else:
        table.reverse()
    with pytest.raises(AssertionError):
        check_complete({**PARTS, "C++": found}, SPECIFIED)


@pytest.mark.parametrize(
    ("variant", "other"), [("plain", "amsgrad"), ("amsgrad", "plain"), ("plain", None)]
)
def test_another_triton_variant_is_noticed(variant, other):
    functions = dict(kernels.RULES["adam"])
    if other is None:
        del functions[variant]
    else:
        functions[variant] = functions[other]
    with pytest.raises(AssertionError):
        check_complete({**PARTS, "Triton": {**kernels.RULES, "adam": functions}}, SPECIFIED)


@each_optimizer
def test_every_variant_has_a_setting_and_a_case(optimizer):
    rule = optimizer.ours.rule
    settings = [optimizer.ours([one()], **options) for options in optimizer.settings.values()]
    cases = [
        optimizer.ours([{"params": [one()], **own} for own in case.groups], **case.kwargs)
        for case in ALL_CASES
        if case.optimizer is optimizer
    ]
    for made in (settings, cases):
        groups = [group for opt in made for group in opt.param_groups]
        assert {rule.variant(group) for group in groups} == rule.variants.keys()


def one() -> torch.Tensor:
    return torch.ones(1, requires_grad=True)


def test_native_kernels_refuse_other_states():
    param = torch.nn.Parameter(torch.ones(3))
    slots = _native.Slots(
        num_scalars=len(SPECIFIED["adam"]["scalars"]),
        frozen=False,
        takes_grads=True,
        capturable=False,
        master=False,
        params=[param],
        steps=[torch.zeros((), dtype=torch.float64)],
        states=[[torch.zeros(3), torch.zeros(3)]],
        emas=[[]],
        groups=[0],
        param_indices=[0],
    )
    with pytest.raises(
        ValueError, match=r"rule adam, variant amsgrad: received 2 states, allowed 3"
    ):
        _native.Plan("adam", "amsgrad", slots, False)
    with pytest.raises(ValueError, match="no kernel for rule adam, variant nesterov"):
        _native.Plan("adam", "nesterov", slots, False)


class Scalars(NamedTuple):
    """The hyper-parameters of a made-up rule."""

    grad_factor: float
    lr: float


def update(param: Values, grad: Values, states: Mapping[str, Values], c: Scalars) -> None:
    """``s <- s + g``; ``p <- p - lr*(b <- b/2 + s)``, or ``p <- p - lr*(s - (m <- m - g))``."""
    grad = directed(grad, param, c.grad_factor, 0.0)
    total = states["total"].add_(grad)
    if "buffer" in states:
        total = states["buffer"].mul_(0.5).add_(total)
    if "mean" in states:
        total = total.add(states["mean"].add_(grad, alpha=-1.0), alpha=-1.0)
    param.sub_(total, alpha=c.lr)


@device
def with_buffer(param, grad, states, scalars):
    grad_factor, lr = scalars
    total = states[0] + grad_factor * grad
    buffer = 0.5 * states[1] + total
    return param - lr * buffer, (total, buffer)


@device
def with_mean(param, grad, states, scalars):
    grad_factor, lr = scalars
    total = states[0] + grad_factor * grad
    mean = states[1] - grad_factor * grad
    return param - lr * (total - mean), (total, mean)


# Two variants with as many states as each other.
MADE_UP = Rule(
    name="made up",
    numbers=("lr", "kappa"),
    flags=("centered", "maximize"),
    choices={},
    check=lambda group: None,
    variants={"buffer": ("total", "buffer"), "mean": ("total", "mean")},
    variant=lambda group: "mean" if group["centered"] else "buffer",
    scale=lambda group: Scalars(-1.0 if group["maximize"] else 1.0, group["lr"]),
    at_kappa=lambda group: {"lr": group["lr"]},
    fold=lambda hyper, step: hyper,
    update=update,
    scalars=Scalars,
)


class MadeUp(fused_ema.FusedScaledOptimizer):
    rule = MADE_UP

    def __init__(self, params, lr: float = 0.5, centered: bool = False, **options: Any) -> None:
        flags = dict.fromkeys(("foreach", "fused"))
        switches = dict.fromkeys(("maximize", "capturable", "differentiable"), False)
        super().__init__(params, {"lr": lr, "centered": centered, **flags, **switches}, **options)


@pytest.mark.parametrize("engine", ["reference", "foreach", "triton"])
def test_variants_may_keep_equally_many_states(engine, monkeypatch):
    if engine == "triton" and not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    functions = {"buffer": with_buffer, "mean": with_mean}
    monkeypatch.setitem(kernels.RULES, MADE_UP.name, functions)
    params = [torch.nn.Parameter(torch.full((3,), 8.0)) for _ in "ab"]
    groups = [{"params": [param], "centered": param is params[1]} for param in params]
    opt = MadeUp(groups, ema_decay=0.5, backend=engine)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones(3)
        opt.step()
    assert list(opt.backends) == [engine] * 2
    # totals 1, 2; buffers 1, 2.5; means -1, -2
    for param, name, value, weight in zip(
        params, ("buffer", "mean"), (2.5, -2.0), (8.0 - 0.5 * 3.5, 8.0 - 0.5 * 6.0), strict=True
    ):
        state = opt.state[param]
        assert state.keys() == {"step", "ema", "total", name}
        assert torch.equal(param, torch.full((3,), weight))
        assert torch.equal(state["total"], torch.full((3,), 2.0))
        assert torch.equal(state[name], torch.full((3,), value))


def test_a_made_up_rule_has_no_native_kernel():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    opt = MadeUp([param], backend="native")
    with pytest.raises(RuntimeError, match="no kernel for rule 'made up', variant 'buffer'"):
        opt.step()
