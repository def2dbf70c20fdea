"""That the records of optimizers.py, and the cases, leave no optimizer and no option out."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from cases import ALL_CASES, BASES, FEW, FLAGS, Case
from harness import make_problem
from optimizers import OPTIMIZERS, SGD, each_optimizer, each_setting_in_torch
from oracles.sgd import Sgd

import fused_ema
from fused_ema import rules


def test_every_optimizer_has_a_record_and_cases():
    exported = {getattr(fused_ema, name) for name in fused_ema.__all__}
    classes = {c for c in exported if isinstance(c, type) and hasattr(c, "rule")}
    optimizers = classes - {fused_ema.FusedScaledOptimizer, fused_ema.FusedEMA}
    assert {optimizer.ours for optimizer in OPTIMIZERS.values()} == optimizers
    assert BASES.keys() == OPTIMIZERS.keys()
    assert FLAGS.keys() == {name for name, o in OPTIMIZERS.items() if o.theirs is not None}


def test_every_rule_has_an_optimizer():
    known = {optimizer.ours.rule for optimizer in OPTIMIZERS.values()}
    assert known == set(rules.RULES.values()) - {rules.FROZEN}


def test_cases_change_every_option():
    seen = defaultdict(set)
    for case in ALL_CASES:
        rule = case.optimizer.ours.rule
        groups = [{"params": [torch.zeros(1, requires_grad=True)], **own} for own in case.groups]
        for group in case.optimizer.ours(groups, **case.kwargs).param_groups:
            for name in rule.hyper:
                seen[rule.name, name].add(group[name])
    assert seen.keys() == {
        (rule.name, name) for rule in rules.RULES.values() if rule.flags for name in rule.hyper
    }
    assert [option for option, values in seen.items() if len(values) < 2] == []


@each_optimizer
def test_settings_need_every_state(optimizer):
    needed = [name for options in optimizer.settings.values() for name in optimizer.states(options)]
    assert set(needed) == set(optimizer.oracle.state_names)


@each_setting_in_torch
def test_states_have_torchs_names(optimizer, options):
    found = []
    for cls in (optimizer.ours, optimizer.theirs):
        p = torch.ones(3, requires_grad=True)
        p.grad = torch.ones(3)
        opt = cls([p], **options)
        opt.step()
        found.append({name for name, value in opt.state[p].items() if value is not None} - {"step"})
    assert found[0] == found[1] <= set(optimizer.oracle.state_names)


@each_optimizer
def test_scalars_fill_the_rules_record(optimizer):
    for row in optimizer.scalars:
        assert len(optimizer.ours.rule.scalars(*row)) == len(row)


@dataclass(frozen=True)
class NormalizedSgd(Sgd):
    """A step as long as the rate, whatever the gradient: a rule that looks at whole tensors."""

    elementwise = False

    def direction(self, scalars, state, g):
        return g / np.linalg.norm(g), None


@pytest.mark.parametrize("oracle", [Sgd, NormalizedSgd])
def test_a_rule_of_whole_tensors_follows_them_one_by_one(oracle):
    case = Case("one", replace(SGD, oracle=oracle), {}, groups=({}, {}))
    problem = make_problem(case, FEW, [torch.float32, torch.float64], 1)
    counts = [len(cohort.params) for cohort in problem.cohorts]
    together = [3, 2, 3, 2]
    assert counts == (together if oracle.elementwise else [1] * 2 * len(FEW))
