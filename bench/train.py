"""Whole training steps: forward and backward passes of timm's models, then a provider's step.

The share of the step is the most that any optimizer could save.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import median
from time import monotonic, perf_counter

import torch
from torch import nn

from .cases import CASES, MODELS
from .check import Checker, Verdict
from .data import Data
from .device import Device
from .harness import LEAST_ROUNDS, Settings, deciles, no_collection
from .provider import NotOfferedError, Provider
from .providers import FEW_TRAINERS, NATIVE, TRAINERS
from .spec import Group, Spec
from .theirs import library

# Images in a step, by the type of the device. The optimizer's share shrinks with larger batches.
BATCHES = {
    "cpu": {"resnet18": 8, "resnetv2_50": 4, "vit_b16": 2},
    "cuda": {"resnet18": 128, "resnetv2_50": 128, "vit_b16": 128},
}
IMAGE = (3, 224, 224)
CLASSES = 1000
TRAINED = tuple(BATCHES["cpu"])
# The model with which there is time for more than a few providers.
SMALLEST = "resnet18"


@dataclass
class Training:
    """A provider's seconds, one for each round, or the verdict why there are none.

    passes: times of forward and backward passes.
    steps: times of optimizer and average.
    against_ours: the whole time over the first provider's, round by round.
    """

    model: str
    batch: int
    spec: Spec
    provider: Provider
    verdict: Verdict
    passes: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    against_ours: list[float] = field(default_factory=list)

    @property
    def totals(self) -> list[float]:
        return [sum(both) for both in zip(self.passes, self.steps, strict=True)]

    @property
    def p10(self) -> float:
        return deciles(self.totals)[0]

    @property
    def p90(self) -> float:
        return deciles(self.totals)[-1]

    @property
    def share(self) -> float:
        """The step's share of the whole time."""
        return median(s / t for s, t in zip(self.steps, self.totals, strict=True))


class Trainer:
    """A model that a provider trains on one random batch."""

    def __init__(self, model: nn.Module, provider: Provider, spec: Spec, device: Device) -> None:
        self._model = deepcopy(model).to(device.torch_device).train()
        self._device = device
        self._step = provider.make([Group(list(self._model.parameters()))], spec).step

    def seconds(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
        """The times of forward and backward passes, and of the step."""
        self._device.synchronize()
        start = perf_counter()
        self._model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self._model(images), labels).backward()
        self._device.synchronize()
        middle = perf_counter()
        self._step()
        self._device.synchronize()
        return middle - start, perf_counter() - middle


def measure_training(
    names: Sequence[str], spec: Spec, device: Device, settings: Settings
) -> list[Training]:
    start, found = monotonic(), []
    for i, name in enumerate(names, start=1):
        deadline = start + settings.seconds * i / len(names)
        found += train(name, spec, device, settings, deadline)
    return found


def train(
    name: str, spec: Spec, device: Device, settings: Settings, deadline: float
) -> list[Training]:
    """Check every provider on the model's shapes, then time the correct ones in turns."""
    kind = device.torch_device
    batch = BATCHES[kind.type][name]
    trainers = TRAINERS if name == SMALLEST else FEW_TRAINERS
    verdicts = verdicts_on(name, settings.wanted(trainers), spec, device, settings)
    results = {p: Training(name, batch, spec, p, verdict) for p, verdict in verdicts.items()}
    try:
        timm = library("timm")
    except NotOfferedError as reason:
        for result in results.values():
            result.verdict = Verdict(left_out=str(reason))
        return list(results.values())
    torch.manual_seed(settings.seed)
    model = timm.create_model(MODELS[name])
    images = torch.randn(batch, *IMAGE, device=kind)
    labels = torch.randint(CLASSES, (batch,), device=kind)
    right = [provider for provider, verdict in verdicts.items() if verdict.is_right]
    running = {p: Trainer(model, p, spec, device) for p in right}
    order = random.Random(settings.seed)
    with no_collection():
        for trainer in running.values():
            trainer.seconds(images, labels)
        for count in range(settings.rounds):
            if count >= LEAST_ROUNDS and monotonic() > deadline:
                break
            order.shuffle(right)
            seconds = {p: running[p].seconds(images, labels) for p in right}
            for p in right:
                results[p].passes.append(seconds[p][0])
                results[p].steps.append(seconds[p][1])
                if NATIVE in seconds:
                    ours = sum(seconds[NATIVE])
                    results[p].against_ours.append(sum(seconds[p]) / ours)
    return list(results.values())


def verdicts_on(
    name: str, providers: Sequence[Provider], spec: Spec, device: Device, settings: Settings
) -> dict[Provider, Verdict]:
    data = Data.draw(CASES[name], spec.scenario.dtype, device, settings.seed)
    checker = Checker(spec, data, device)
    return {provider: checker.check(provider) for provider in providers}
