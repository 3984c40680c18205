#!/usr/bin/env bash
# All tests marked `gpu` on one NVIDIA GPU, in as short a time as the cores allow: in WORKERS
# processes, where pytest-xdist is installed, and beside them the smoke tests of the benchmarks,
# which pin their threads to a core. Then what measures a time, alone. More arguments go to the
# pytest of the first. LOGS is the folder of the outputs.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
LOGS=${LOGS:-build/check-gpu}
WORKERS=${WORKERS:-$((($(nproc) + 1) / 2))}
TIMED=tests/kernels/cuda/test_cuda_library.py::test_a_launch_takes_no_longer_than_three_of_torch
# Each process would start as many threads as there are cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TORCHINDUCTOR_COMPILE_THREADS=1

if ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "check-gpu: torch sees no GPU here" >&2
  exit 2
fi
mapfile -t files < <(grep -rl --include="test_*.py" "mark\.gpu\b" tests)
spread=()
if "$PYTHON" -c "import xdist" 2> /dev/null; then
  spread=(-n "$WORKERS" --dist worksteal -p no:benchmark)
fi
mkdir -p "$LOGS"

check() {  # name, arguments of pytest
  local log="$LOGS/$1.log"
  shift
  "$PYTHON" -m pytest -q --tb=short -rfEs -p no:cacheprovider -m gpu "$@" > "$log" 2>&1
}

# What did not pass, by name, and the summary.
report() {  # name, exit status
  echo "== $1: exit status $2 after $SECONDS s"
  if (($2)); then
    failed+=("$1")
    grep -E "^E   " "$LOGS/$1.log" | head -n 40 || true
  fi
  grep -E "^(FAILED|ERROR|SKIPPED) " "$LOGS/$1.log" | cut -c 1-300 || true
  grep . "$LOGS/$1.log" | tail -n 1
}

failed=()
check bench bench/bench_gpu.py --quick &
bench=$!
code=0; check tests "${files[@]}" --deselect "$TIMED" "${spread[@]}" "$@" || code=$?
report tests $code
code=0; wait $bench || code=$?
report bench $code
code=0; check timed "$TIMED" || code=$?
report timed $code

if ((${#failed[@]})); then
  echo "check-gpu: ${failed[*]} failed after $SECONDS s, all of it in $LOGS"
  exit 1
fi
echo "check-gpu: clean in $SECONDS s"
