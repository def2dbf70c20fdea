"""What a plan keeps on its device, read on another stream than it was made on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
import twins
from torch import nn

from fused_ema import FusedScaledAdamW
from fused_ema.extension import cuda
from fused_ema.step.backends import streams, triton

# Too many for the words to travel with a launch, which passes at most 32 KB.
MANY = 3300


class Allocator:
    """Stands in for torch's: knows the stream of every memory, and which others were told of."""

    def __init__(self) -> None:
        self.stream = "a"
        self.readers: dict[int, set[str]] = {}
        self.alive: list[torch.Tensor] = []
        self.recorded = 0

    def record(self, tensor: torch.Tensor, stream: str) -> None:
        self.recorded += 1
        self.readers.setdefault(tensor.untyped_storage().data_ptr(), set()).add(stream)

    def read(self, tensor: torch.Tensor) -> None:
        """Memory that is read for the first time was made on that stream, as part of the step."""
        self.alive.append(tensor)  # or another one might come to lie there
        first = tensor.untyped_storage().data_ptr()
        assert self.stream in self.readers.setdefault(first, {self.stream})


@pytest.fixture
def allocator(monkeypatch) -> Allocator:
    """In place of torch's under Triton's plans, whose launches it sees."""
    allocator = Allocator()
    monkeypatch.setattr(streams, "current", lambda device: allocator.stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *told: allocator.record(*told))
    make = triton.TritonPlan

    def watched(launch: Callable[..., None], chunks: torch.Tensor) -> Callable[..., None]:
        def call(**tensors):
            for given in (chunks, *tensors.values()):
                for value in given if isinstance(given, tuple) else (given,):
                    if isinstance(value, torch.Tensor):
                        allocator.read(value)
            return launch(**tensors)

        return call

    class Plan(make):
        def __init__(self, bucket) -> None:
            super().__init__(bucket)
            self._launch = watched(self._launch, self._chunks)
            self._squares = watched(self._squares, self._chunks)

    monkeypatch.setattr(triton, "TritonPlan", Plan)
    return allocator


def steps(options: dict, set_stream: Callable[[str], None], count: int = 3) -> Iterator[str]:
    """Steps on two streams, of which each waits for the other; what was done is told."""
    params = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(count)]
    opt = FusedScaledAdamW(params, ema_decay=0.9, max_grad_norm=1.0, **options)
    kept = []

    def step() -> None:
        twins.set_gradients(0, params)
        kept.extend(p.grad for p in params)  # so that every gradient has an address of its own
        opt.step()

    for stream in ("a", "a", "b", "b", "a"):
        set_stream(stream)
        step()
        yield stream
    for stream in ("a", "b"):
        for p in params:
            kept.append(p.data)
            p.data = p.data.clone()
        set_stream(stream)
        step()
        yield f"{stream}, other memory"
    params.append(nn.Parameter(torch.ones(4, dtype=torch.bfloat16)))
    opt.add_param_group({"params": params[-1:]})
    step()
    yield "b, another parameter"


@pytest.mark.parametrize("capturable", [False, True])
def test_triton_reads_nothing_that_the_allocator_may_give_away(allocator, capturable):
    def set_stream(name: str) -> None:
        allocator.stream = name

    found = {}
    before = 0
    for i, what in enumerate(steps({"backend": "triton", "capturable": capturable}, set_stream)):
        found[i, what] = allocator.recorded - before
        before = allocator.recorded
    changes = [what for what, count in found.items() if count > 0]
    assert changes == [(2, "b"), (4, "a"), (6, "b, other memory")]


@pytest.mark.parametrize("count", [3, MANY])
def test_cuda_tables_are_recorded_on_every_stream_that_reads_them(count, device_backend):
    if device_backend != "shim":
        pytest.skip("of the CUDA plan")
    library = ctypes.CDLL(cuda.__file__)

    def set_stream(name: str) -> None:
        library.shim_set_stream(ctypes.c_void_p(ord(name)))

    # chunks, ticket, control, slots; and the words before those, where a launch does not pass them
    tables = 4 + (count == MANY)
    found = []
    for _ in steps({"backend": "shim", "fused": True}, set_stream, count):
        found.append(library.shim_num_recorded())
    library.shim_set_stream(None)
    assert found == [0, 0, tables, 0, tables, 0, tables, 0]
