"""Tiny runs of an experiment that end at a chosen moment: ``python experiments_worker.py OUT``.

Imports once and forks a process a run, which is not what a user does, but takes a tenth of the
time. A moment is a call of what writes to the disk, or the start or end of an optimizer's step.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fused_ema import FusedScaledSGD
from fused_ema.experiments import files, plots, polyak
from fused_ema.experiments.distributed import Group
from fused_ema.experiments.folder import Folder

CONFIG = dataclasses.replace(
    polyak.PRESETS["quick"], train_size=64, base_batch=16, epochs=2, warmup_epochs=1.0, seeds=1,
    kappas=(1.0,), optimizers=("SGD",), evaluate_epochs=1,
)  # fmt: skip
# Each folder's run is ended at these moments, one after the other, then runs to its end.
ENDS = {
    "killed": [(16, "kill"), (33, "kill"), (47, "kill")],
    "interrupted": [(31, "interrupt"), (36, "interrupt"), (53, "interrupt")],
    "whole": [],
}


class Moments:
    """Counts moments, and ends the process at one of them."""

    def __init__(self, last: int, how: str) -> None:
        self.count, self.last, self.how = 0, last, how

    def now(self) -> None:
        self.count += 1
        if self.count == self.last:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            for _ in range(2):  # the second one does not wait for the step to end
                os.kill(os.getpid(), signal.SIGINT)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.now()
            result = call(*args, **kwargs)
            self.now()
            return result

        return counted


def run(out: Path) -> None:
    with Folder(out, "polyak", CONFIG) as folder:
        polyak.run(CONFIG, folder, Group())


def run_until(out: Path, last: int, how: str) -> int:
    """The state in which a process of its own ends."""
    number = os.fork()
    if number == 0:
        moments = Moments(last, how)
        for owner, name in ((files, "sync"), (os, "replace"), (FusedScaledSGD, "step")):
            setattr(owner, name, moments.around(getattr(owner, name)))
        try:
            run(out)
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def main(out: Path) -> None:
    torch.set_num_threads(1)
    # the figure itself takes longer than the run
    plots.draw = lambda data, path: path.write_text(str(data))
    for name, ends in ENDS.items():
        for last, how in ends:
            state = run_until(out / name, last, how)
            expected = -signal.SIGKILL if how == "kill" else 130
            assert state == expected, f"{name}, moment {last}: exit status {state}"
        assert run_until(out / name, 0, "") == 0, name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
