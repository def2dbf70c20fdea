"""Runs two processes under torchrun on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

LAUNCH = ("torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")


def run_two(*command: str) -> None:
    """Wait for both: a script or "-m" and a module, then its arguments."""
    env = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",  # is there without any network
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCH, *command],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
