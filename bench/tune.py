"""Times the variants of the step kernel from ``bench.variants``, for AdamW and one average.

Every variant must give the bits of the first. Times are medians, taken in turns with a copy between
two tensors that no cache holds; ``of_copy`` is the bandwidth, by counted bytes, over that of the
copy.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter

import torch

from .cases import CASES, Case, shrunk
from .device import MILLI
from .table import GIGA
from .variant import BYTES_PER_PARAM, Bucket, Variant
from .variants import INDEX

# The most important first.
ORDER = ("vit_b16", "resnet18", "vit_l16", "tiny_10000x64", "one_100m")
TURNS, LAUNCHES, WARM_UP = 3, 15, 3
COPY = "copy"
COPIED = 2**27  # elements
COLUMNS = ("case", "variant", "registers", "ms", "gb_s", "of_copy", "same_bits")
SHOWN = 12

Launch = Callable[[], object]


class CpuClock:
    """Times launches on a CPU, where a launch has ended when it returns."""

    def seconds(self, launch: Launch, count: int) -> float:
        return median(self._once(launch) for _ in range(count))

    def _once(self, launch: Launch) -> float:
        start = perf_counter()
        launch()
        return perf_counter() - start


class CudaClock:
    """Times launches by events around each; all wait until the host has queued them."""

    WAIT_CYCLES = 2_000_000  # a millisecond

    def seconds(self, launch: Launch, count: int) -> float:
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(count)
        ]
        torch.cuda._sleep(self.WAIT_CYCLES)
        for begin, end in pairs:
            begin.record()
            launch()
            end.record()
        torch.cuda.synchronize()
        return median(begin.elapsed_time(end) for begin, end in pairs) * MILLI


Clock = CpuClock | CudaClock


@dataclass
class Measured:
    """A variant on one case: its bandwidth over the copy's, and its seconds, by turn."""

    same_bits: bool
    seconds: list[float]
    of_copy: list[float]


def same_bits(variants: Sequence[Variant], bucket: Bucket) -> Iterator[bool]:
    """Whether each variant's step, from the same start, has the bits of the first one's."""
    start = [array.clone() for array in bucket.arrays]
    expected: list[torch.Tensor] = []
    for variant in variants:
        for array, own in zip(bucket.arrays, start, strict=True):
            array.copy_(own)
        variant.step(bucket)
        if not expected:
            expected = [array.clone() for array in bucket.arrays]
        yield all(map(torch.equal, bucket.arrays, expected))


def measure(
    variants: Sequence[Variant], bucket: Bucket, clock: Clock, copied: int
) -> dict[str, Measured]:
    """Time the variants in turns, in an order shuffled with a fixed seed."""
    right = list(same_bits(variants, bucket))
    found = {v.name: Measured(same, [], []) for v, same in zip(variants, right, strict=True)}
    found[COPY] = Measured(True, [], [])
    source = torch.rand(copied, device=bucket.device)
    target = torch.empty_like(source)
    moved = BYTES_PER_PARAM * bucket.numel
    order, turn = random.Random(0), list(variants)
    for variant in variants:
        clock.seconds(partial(variant.step, bucket), WARM_UP)
    for _ in range(TURNS):
        order.shuffle(turn)
        copy = clock.seconds(partial(target.copy_, source), LAUNCHES)
        bandwidth = 2 * source.nbytes / copy
        found[COPY].seconds.append(copy)
        found[COPY].of_copy.append(1.0)
        for variant in turn:
            seconds = clock.seconds(partial(variant.step, bucket), LAUNCHES)
            found[variant.name].seconds.append(seconds)
            found[variant.name].of_copy.append(moved / seconds / bandwidth)
    return found


def rows(
    case: Case,
    found: Mapping[str, Measured],
    index: Mapping[str, Mapping[str, object]],
    copied: int,
) -> list[dict[str, object]]:
    """The rows of the table, the fastest first."""
    made = []
    for name, own in found.items():
        seconds = median(own.seconds)
        moved = 8 * copied if name == COPY else BYTES_PER_PARAM * case.numel
        told = index.get(name, {})
        made.append(
            {
                "case": case.name,
                "variant": name,
                "registers": told.get("registers"),
                "ms": f"{seconds / MILLI:.5g}",
                "gb_s": f"{moved / seconds / GIGA:.5g}",
                "of_copy": f"{median(own.of_copy):.4f}",
                "same_bits": own.same_bits,
            }
        )
    return sorted(made, key=lambda row: -float(str(row["of_copy"])))


def text(case: Case, found: Sequence[Mapping[str, object]]) -> Iterator[str]:
    yield f"{case.title}, {BYTES_PER_PARAM} B a parameter"
    for place, row in enumerate(found[:SHOWN], start=1):
        other = "" if row["same_bits"] else "  OTHER BITS"
        share = float(str(row["of_copy"]))
        time = f"{row['ms']:>9} ms {row['gb_s']:>7} GB/s {share:6.1%}"
        yield f"{place:3}. {row['variant']:20} {time}{other}"


def main(argv: Sequence[str] | None = None) -> int:
    """Return 1 if a variant gave other bits, or a case had no time."""
    start = monotonic()
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("variants", type=Path, help="a folder from bench.variants")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no case later (60)")
    parser.add_argument("--shrink", type=int, default=1, help="cut tensors, for a trial")
    args = parser.parse_args(argv)
    index = json.loads((args.variants / INDEX).read_text())
    if args.device.type == "cuda":
        torch.cuda.init()  # loads CUDA's runtime, which the libraries share
    variants = [Variant(args.variants / f"{name}.so") for name in index]
    clock = CpuClock() if args.device.type == "cpu" else CudaClock()
    copied = COPIED // args.shrink
    table: list[dict[str, object]] = []
    late = []
    for name in ORDER:
        if monotonic() - start > args.seconds:
            late.append(name)
            continue
        case = shrunk(CASES[name], args.shrink)
        found = measure(variants, Bucket(case, args.device), clock, copied)
        own = rows(case, found, index, copied)
        table += own
        print(*text(case, own), sep="\n", flush=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    if late:
        print(f"no time left for {', '.join(late)}")
    return int(bool(late) or not all(row["same_bits"] for row in table))


if __name__ == "__main__":
    raise SystemExit(main())
