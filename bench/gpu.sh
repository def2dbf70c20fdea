#!/usr/bin/env bash
# Builds, tests and measures fused_ema on an NVIDIA GPU: bench/gpu.sh OUTDIR [ARGUMENT...]
#
# Takes at most 10 minutes and no network. OUTDIR gets summary.txt, which tells what passed and what
# failed, gpu.csv with the times, and logs. A step that fails does not keep the next ones from
# running, unless nothing can run without it; the exit status is 1 if any failed. The arguments are
# for bench.run.
#
# PYTHON (python3) is the interpreter, which must have torch, numpy and pytest.
# DEVICE (cuda) may be cpu: that tries out this script where there is no GPU.
# TORCH_CUDA_ARCH_LIST (this GPU's) is what to compile for.
set -euo pipefail

if (($# == 0)) || [[ $1 == -* ]]; then
  echo "usage: bench/gpu.sh OUTDIR [ARGUMENT of bench.run ...]" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
device=${DEVICE:-cuda}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# In seconds, as all times here. The other steps' limits add up to 565, of which they hardly need
# half; the benchmark gets what is left of the total.
readonly TOTAL=580 KILL_AFTER=5
summary=$out/summary.txt
failed=()
rm -f "$out"/{setup,gpu-tests,parity,triton,memcheck,bench}.log "$out/gpu.csv"
: >"$summary"
export PYTHONUNBUFFERED=1

note() {
  printf '%s\n' "$*" | tee -a "$summary"
}

# NAME LIMIT LOG COMMAND...: notes how the command ended, and its status is the function's.
step() {
  local name=$1 limit=$2 log=$out/$3 status=0 start=$SECONDS verdict
  shift 3
  echo "$name: at most $limit s ..." >&2
  printf '\n$ %s\n' "$*" >>"$log"
  timeout --kill-after="$KILL_AFTER" "$limit" "$@" >>"$log" 2>&1 </dev/null || status=$?
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="FAILED: stopped after $limit s" ;;
    *) verdict="FAILED: exit status $status" ;;
  esac
  note "$(printf '%-11s %4d s  %s' "$name" $((SECONDS - start)) "$verdict")$(counts "$log")"
  if ((status != 0)); then
    failed+=("$name")
    tail -n 15 "$log" | cut -c -200 | sed 's/^/    | /' | tee -a "$summary"
  fi
  return "$status"
}

skip() {
  note "$(printf '%-11s    - s  skipped: %s' "$1" "$2")"
}

# What pytest says of its tests, if the log is pytest's.
counts() {
  local line
  if line=$(grep -E '^[0-9]+ (passed|failed|skipped|error|deselected).* in ' "$1" | tail -n 1); then
    printf ' (%s)' "$line"
  fi
}

# However the script ends.
finish() {
  local status=$?
  if ((status == 0 && ${#failed[@]} == 0)); then
    note "all passed in $SECONDS s"
  else
    note "FAILED after $SECONDS s: ${failed[*]:-the script itself}"
    status=1
  fi
  exit "$status"
}
trap finish EXIT

# Nothing after it could run.
need() {
  step "$@" || exit 1
}

commit=$(git rev-parse --short HEAD 2>/dev/null || true)
note "fused_ema $commit on $device, $(date -u '+%F %R') UTC"
step nvidia-smi 20 setup.log nvidia-smi || true
need versions 60 setup.log "$python" -c '
import platform, sys, torch
print("Python", platform.python_version(), "at", sys.executable)
print("torch", torch.__version__, "for CUDA", torch.version.cuda)
try:
    import triton
    print("triton", triton.__version__)
except ImportError as error:
    print(error)
if sys.argv[1] != "cpu":
    torch.zeros(1, device=sys.argv[1])
    print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0))
    print("compute capability", "%d.%d" % torch.cuda.get_device_capability())
' "$device"
grep -aE '^(Python|torch|triton) |^No module|Driver Version|^compute' "$out/setup.log" |
  tr -d '|' | tr -s ' ' | sed 's/^ */    /' | tee -a "$summary"

packages='import sysconfig; print(sysconfig.get_path("purelib"))'
if ! "$python" - <<'END'; then
import os, sys, sysconfig
paths = sysconfig.get_paths()
marker = os.path.join(paths["stdlib"], "EXTERNALLY-MANAGED")
managed = sys.prefix == sys.base_prefix and os.path.exists(marker)
sys.exit(managed or not os.access(paths["purelib"], os.W_OK))
END
  # By itself it sees the packages of the system's Python, but not those of a virtual environment.
  # Without pip, because not every Python brings one to install: the outer one will do.
  venv=$PWD/build/gpu-venv
  "$python" -m venv --system-site-packages --without-pip "$venv"
  outer=$("$python" -c "$packages")
  python=$venv/bin/python
  echo "import site; site.addsitedir('$outer')" >"$("$python" -c "$packages")/outer.pth"
  note "    pip is not to write into $outer"
fi
note "    installing into $("$python" -c "$packages")"

# For the build to find the environment's ninja.
scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
PATH=$scripts:$(dirname "$python"):$PATH
arch=$(sed -n 's/^compute capability //p' "$out/setup.log")
if [[ -n $arch ]]; then
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch}
fi
need build 180 setup.log "$python" -m pip install --verbose --disable-pip-version-check --no-index \
  --no-build-isolation --no-deps --editable .
step build-info 15 setup.log "$python" -c '
import fused_ema
print(fused_ema.build_info() if hasattr(fused_ema, "build_info") else "no fused_ema.build_info()")
' || true
tail -n 1 "$out/setup.log" | sed 's/^/    /' | tee -a "$summary"

step gpu-tests 60 gpu-tests.log "$python" -m pytest tests/test_gpu.py --tb=short --device "$device" || true

jobs=()
if "$python" -c 'import xdist' 2>/dev/null; then
  workers=$(nproc)
  jobs=(--numprocesses $((workers < 8 ? workers : 8)))
fi
step parity 110 parity.log "$python" -m pytest tests/test_parity.py --tb=short --device "$device" \
  --backends native,triton,foreach,reference "${jobs[@]}" || true

step triton 60 triton.log "$python" tests/triton_targets.py || true

sanitizer=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
sanitizer=$(command -v compute-sanitizer || echo "$sanitizer")
if [[ -x $sanitizer ]]; then
  # Not every error that a CUDA function returns: torch asks for things that may be absent.
  step memcheck 60 memcheck.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "$sanitizer" --tool memcheck --report-api-errors no --error-exitcode 9 \
    "$python" -m bench.memcheck --device "$device" || true
else
  skip memcheck "compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin"
fi

left=$((TOTAL - SECONDS - KILL_AFTER))
left=$((left > 1 ? left : 1)) # 0 would be no limit
# The last case may begin at the last moment.
step bench "$left" bench.log "$python" -m bench.run --device "$device" --seconds $((left - 45)) \
  --out "$out/gpu.csv" "$@" || true
sed -n '/^[a-z0-9_]*: .*;/,$p' "$out/bench.log" >>"$summary"
