"""The host's cost of a step: tensors with hardly any elements, time fitted as ``a + b*n``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cases import host_cases
from .device import Device
from .harness import Result, Settings, measure
from .providers import HOST_PROVIDERS
from .spec import Spec


@dataclass(frozen=True)
class Fit:
    """Seconds of a step: ``per_step + per_tensor * n``."""

    spec: Spec
    provider: str
    hot: bool
    per_step: float
    per_tensor: float


def measure_host(spec: Spec, device: Device, settings: Settings) -> list[Result]:
    return [
        result
        for hot in (False, True)
        for case in host_cases(hot, device.host_elements)
        for result in measure(
            case, spec, HOST_PROVIDERS[device.torch_device.type], device, settings
        )
    ]


def fits(results: Sequence[Result]) -> list[Fit]:
    """A line through the medians for every provider that has all its times."""
    series: dict[tuple[str, bool], list[Result]] = {}
    for result in results:
        series.setdefault((result.provider.name, result.case.hot), []).append(result)
    return [
        Fit(own[0].spec, provider, hot, *line(own))
        for (provider, hot), own in series.items()
        if all(result.seconds for result in own)
    ]


def line(results: Sequence[Result]) -> tuple[float, float]:
    """Intercept and slope with the least squared *relative* errors.

    Noise grows with the time, so with absolute errors the longest time alone would decide.
    """
    points = [(len(result.case.shapes), result.median) for result in results]
    weights = [1.0 / time**2 for _, time in points]
    total = sum(weights)
    mean_n = sum(w * n for w, (n, _) in zip(weights, points, strict=True)) / total
    mean_t = sum(w * t for w, (_, t) in zip(weights, points, strict=True)) / total
    around = [(w, n - mean_n, t - mean_t) for w, (n, t) in zip(weights, points, strict=True)]
    slope = sum(w * n * t for w, n, t in around) / sum(w * n * n for w, n, _ in around)
    return mean_t - slope * mean_n, slope
