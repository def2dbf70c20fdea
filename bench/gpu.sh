#!/usr/bin/env bash
# Tests, measures and tunes on a GPU machine that is at hand for minutes:
#
#   bench/gpu.sh first OUTDIR     # 9 minutes at most
#   bench/gpu.sh second OUTDIR    # 4 more, on the same machine
#
# README.md beside this file tells what they do, and what to prepare. `--parts` and `--without`
# choose among the parts. No network is used.
#
# PYTHON (python3) is the interpreter, which must have torch, numpy, pytest and setuptools.
# DEVICE (cuda) may be cpu: that tries all of it out where there is no GPU, on small tensors.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
PYTHONPATH=$root exec "$python" -m bench.gpu "$@" --device "${DEVICE:-cuda}"
