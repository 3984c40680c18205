#!/usr/bin/env bash
# memcheck, racecheck and initcheck of compute-sanitizer over the tests marked `sanitize`, on a
# machine with an NVIDIA GPU where the package is installed. More arguments go to pytest.
#
# memcheck and racecheck look into our own kernels alone (sk_*): the others are torch's. initcheck
# must see every kernel, or what torch has written would count as never written.
set -euo pipefail
cd "$(dirname "$0")/.."

BUDGET_S=240  # for the three together
PYTHON=${PYTHON:-python3}
PATH="$PATH:/usr/local/cuda/bin"
# From torch's cache of memory a kernel can read past its tensor unseen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

if ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "sanitize-gpu: torch sees no GPU here" >&2
  exit 2
fi
mapfile -t files < <(grep -l "mark.sanitize" tests/test_*.py)

check() {
  local began=$SECONDS
  echo "== $*"
  timeout --kill-after=5 $((BUDGET_S - SECONDS)) \
    compute-sanitizer --error-exitcode 1 --print-limit 20 --tool "$@" \
    "$PYTHON" -m pytest -q -p no:cacheprovider -m "gpu and sanitize" "${files[@]}" "${pytest[@]}"
  echo "== $1: $((SECONDS - began)) s"
}

pytest=("$@")
check memcheck --padding 512 --kernel-name kns=sk_
check racecheck --kernel-name kns=sk_
check initcheck
echo "sanitize-gpu: clean in $SECONDS s"
