"""What the device backends share to be captured in a CUDA graph."""

from __future__ import annotations

import torch


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
