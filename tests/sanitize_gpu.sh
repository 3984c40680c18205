#!/usr/bin/env bash
# memcheck, racecheck and initcheck of compute-sanitizer over the tests marked `sanitize`, all three
# at once, on a machine with an NVIDIA GPU where the package is installed. More arguments go to
# pytest. LOGS is the folder of the three outputs.
#
# memcheck and racecheck look into our own kernels alone (sk_*): the others are torch's. initcheck
# must see every kernel, or what torch has written would count as never written.
set -euo pipefail
cd "$(dirname "$0")/.."

BUDGET_S=240
PYTHON=${PYTHON:-python3}
LOGS=${LOGS:-build/sanitize-gpu}
PATH="$PATH:/usr/local/cuda/bin"
# From torch's cache of memory a kernel can read past its tensor unseen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

if ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "sanitize-gpu: torch sees no GPU here" >&2
  exit 2
fi
mapfile -t files < <(grep -rl --include="test_*.py" "mark.sanitize" tests)
mkdir -p "$LOGS"

check() {  # in a process of its own
  exec timeout --kill-after=5 "$BUDGET_S" \
    compute-sanitizer --error-exitcode 1 --print-limit 20 --tool "$@" \
    "$PYTHON" -m pytest -q -p no:cacheprovider -m "gpu and sanitize" "${files[@]}" "${pytest[@]}" \
    > "$LOGS/$1.log" 2>&1
}

pytest=("$@")
declare -A pids
check memcheck --padding 512 --kernel-name kns=sk_ & pids[memcheck]=$!
check racecheck --kernel-name kns=sk_ & pids[racecheck]=$!
check initcheck & pids[initcheck]=$!
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT

failed=()
for tool in memcheck racecheck initcheck; do
  code=0
  wait "${pids[$tool]}" || code=$?
  echo "== $tool: exit status $code after $SECONDS s"
  if ((code)); then
    failed+=("$tool")
    tail -n 60 "$LOGS/$tool.log"
  else
    tail -n 2 "$LOGS/$tool.log"
  fi
done
if ((${#failed[@]})); then
  echo "sanitize-gpu: ${failed[*]} failed after $SECONDS s, all of it in $LOGS"
  exit 1
fi
echo "sanitize-gpu: clean in $SECONDS s"
