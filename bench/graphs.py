"""A step as a CUDA graph: captured once, then replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .provider import NotOfferedError


class Graphed:
    """Takes one normal step, which creates the state, then captures the step and replays it.

    Args:
        step: launches the step, and reads the same memory each time.
        device: the device of the step.

    Raises:
        NotOfferedError: the device has no graphs.
    """

    def __init__(self, step: Callable[[], object], device: torch.device) -> None:
        if device.type != "cuda":
            raise NotOfferedError(f"a CUDA graph needs a CUDA GPU, not {device}")
        self._step = step
        self._stepped = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif self._stepped:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._step()
            self._graph.replay()  # a capture does not run the step
        else:
            self._first()
        self._stepped = True

    def _first(self) -> None:
        """Take the first step on its own stream, as torch requires before a capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
