"""``python -m fused_ema`` prints :func:`~fused_ema.build_info`, for bug reports."""

from __future__ import annotations

import pprint

from .build import build_info

if __name__ == "__main__":
    pprint.pprint(build_info(), width=100, sort_dicts=False)
