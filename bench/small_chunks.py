"""AdamW and an average in programs of 128 elements: the shape of the kernel in apex's FusedAdamSWA.

A program is one warp that finds the addresses of its elements in a row of its own. The host does
less than in apex, which writes and uploads the address of every chunk's gradient: here the device
copies the tensors' addresses to the chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

CHUNK = 128
ROW = 6  # offset in the tensor, number of elements, four addresses


@triton.jit
def step_chunk(
    p_rows,
    p_grads,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    correction1,
    correction2,
    ema_rate,
    CHUNK: tl.constexpr,
    ROW: tl.constexpr,
):
    """Step one chunk of float32 elements."""
    i_chunk = tl.program_id(0).to(tl.int64)
    p_row = p_rows + i_chunk * ROW
    offset, count = tl.load(p_row), tl.load(p_row + 1)
    o_chunk = offset + tl.arange(0, CHUNK)
    mask = tl.arange(0, CHUNK) < count
    p_param = tl.load(p_row + 2).to(tl.pointer_type(tl.float32)) + o_chunk
    p_first = tl.load(p_row + 3).to(tl.pointer_type(tl.float32)) + o_chunk
    p_second = tl.load(p_row + 4).to(tl.pointer_type(tl.float32)) + o_chunk
    p_ema = tl.load(p_row + 5).to(tl.pointer_type(tl.float32)) + o_chunk
    p_grad = tl.load(p_grads + i_chunk).to(tl.pointer_type(tl.float32)) + o_chunk
    grad = tl.load(p_grad, mask)
    param = tl.load(p_param, mask)
    first = tl.load(p_first, mask)
    second = tl.load(p_second, mask)
    ema = tl.load(p_ema, mask)
    first += (1.0 - beta1) * (grad - first)
    second += (1.0 - beta2) * (grad * grad - second)
    change = first / correction1 / (tl.sqrt(second / correction2) + eps)
    param -= lr * (change + weight_decay * param)
    ema += ema_rate * (param - ema)
    tl.store(p_param, param, mask)
    tl.store(p_first, first, mask)
    tl.store(p_second, second, mask)
    tl.store(p_ema, ema, mask)


class SmallChunks:
    """Steps float32 parameters that all have gradients, by the rule of torch's AdamW."""

    def __init__(
        self, params: Sequence[nn.Parameter], betas: tuple[float, float], **scalars: float
    ) -> None:
        self.emas = [param.detach().clone() for param in params]
        self._params = params
        self._betas = betas
        self._scalars = scalars
        self._steps = 0
        self._states = [[torch.zeros_like(ema) for ema in self.emas] for _ in betas]
        rows, tensors = table([list(params), *self._states, self.emas])
        self._rows, self._tensors = rows.to(params[0].device), tensors.to(params[0].device)

    def step(self) -> None:
        self._steps += 1
        corrections = [1.0 - beta**self._steps for beta in self._betas]
        grads = addresses([param.grad for param in self._params])
        of_tensors = grads.to(self._rows.device, non_blocking=True)
        of_chunks = of_tensors.index_select(0, self._tensors)
        scalars = {**self._scalars, "beta1": self._betas[0], "beta2": self._betas[1]}
        step_chunk[(len(of_chunks),)](
            self._rows,
            of_chunks,
            correction1=corrections[0],
            correction2=corrections[1],
            **scalars,
            CHUNK=CHUNK,
            ROW=ROW,
            num_warps=1,
        )


def addresses(tensors: Sequence[Any]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)


def table(arrays: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """A row for every chunk, and the index of its tensor."""
    sizes = torch.tensor([tensor.numel() for tensor in arrays[0]])
    chunks = (sizes + CHUNK - 1) // CHUNK
    tensors = torch.repeat_interleave(chunks)
    first = chunks.cumsum(0) - chunks
    offsets = (torch.arange(len(tensors)) - first[tensors]) * CHUNK
    counts = (sizes[tensors] - offsets).clamp_max(CHUNK)
    columns = [addresses(array)[tensors] for array in arrays]
    return torch.stack([offsets, counts, *columns], dim=1), tensors
