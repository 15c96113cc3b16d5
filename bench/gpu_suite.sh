#!/usr/bin/env bash
# Build, doctor, GPU tests, compute-sanitizer and benchmark on a machine with a GPU and no network, in 9 minutes.
#
#   bench/gpu_suite.sh [--dry-run]
#
# Needs python3 (or $PYTHON) with torch and pytest; nvcc and cmake for the CUDA backend, triton for the Triton one.
# Results go to $OUT, or to bench/results/<GPU>: suite.log, summary.txt and bench.{json,csv,md}. Pictures need no GPU:
# python -m bench plot bench.json. A part that fails or runs out of time does not stop the rest, but the exit status
# is 1 then.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
dry_run=false
case "${1:-}" in
  --dry-run) dry_run=true ;;
  "") ;;
  *) echo "usage: bench/gpu_suite.sh [--dry-run], got '$1'" >&2; exit 2 ;;
esac

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null)
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null)
if [ -z "$gpu" ]; then
  if ! $dry_run; then
    echo "gpu_suite: torch in '$python' sees no GPU; with --dry-run this says what would be done" >&2
    exit 2
  fi
  gpu="no GPU"
fi
out=${OUT:-bench/results/$(printf %s "$gpu" | tr -cs 'A-Za-z0-9.\n' '-')}
log=$out/suite.log
summary=$out/summary.txt

export PATH="$PATH:/usr/local/cuda/bin" # where nvcc and compute-sanitizer often are
export PYTHONUNBUFFERED=1 PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# One architecture builds in a fraction of the time of all.
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}

total=525 # seconds for all parts together; each has a limit of its own as well
failed=0
if ! $dry_run; then
  mkdir -p "$out" || exit 1
  : > "$log"
  { echo "$gpu, $(date -u +%FT%TZ), commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)"; } > "$summary"
fi

# part NAME SECONDS COMMAND: runs COMMAND, a shell line, and notes how it ended.
part() {
  local name=$1 limit=$2 command=$3 left=$((total - SECONDS)) start=$SECONDS verdict
  if $dry_run; then
    printf '%-10s %4d s  %s\n' "$name" "$limit" "$command"
    return
  fi
  [ "$limit" -le "$left" ] || limit=$left
  printf '\n=== %s, at most %d s: %s\n' "$name" "$limit" "$command" | tee -a "$log"
  if [ "$limit" -le 0 ]; then
    verdict="not run, no time left"
    failed=1
  else
    timeout --kill-after=5 "$limit" bash -c "$command" 2>&1 | tee -a "$log"
    case ${PIPESTATUS[0]} in
      0) verdict=passed ;;
      77) verdict="skipped, see suite.log" ;;
      124 | 137) verdict="ran out of its $limit s"; failed=1 ;;
      *) verdict=FAILED; failed=1 ;;
    esac
  fi
  printf '%-10s %4d s  %s: %s\n' "$name" $((SECONDS - start)) "$verdict" "$(grep . "$log" | tail -n 1)" >> "$summary"
}

# Of pytest, 5 means that no test was selected.
# shellcheck disable=SC2016 # for the shell of the part
none_selected='{ status=$?; [ $status = 5 ] && echo "no such tests" && exit 77; exit $status; }'

part build 150 "'$python' -m pip install --no-build-isolation --no-deps -e . \
|| { cmake -S . -B build/gpu-suite && cmake --build build/gpu-suite --parallel; }"
part doctor 30 "'$python' -m flatlora_kernels"
part tests 130 "'$python' -m pytest -q -m gpu -p no:cacheprovider --durations=5 tests || $none_selected"
# Without torch's own cache of memory, each tensor ends where its allocation ends.
part sanitizer 60 "command -v compute-sanitizer || { echo 'compute-sanitizer is not installed'; exit 77; }; \
PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
'$python' -m pytest -q -m gpu -p no:cacheprovider tests/test_linear.py \
-k '(test_plain_linear or test_adapter_and_bias) and not reference' || $none_selected"
part bench 145 "'$python' -m bench --device cuda --out '$out' --name bench --time-limit 110"
part table 10 "'$python' -m bench table '$out/bench.json' > '$out/bench.md'"

$dry_run && { echo "results would go to $out"; exit 0; }
printf '\n'
cat "$summary"
echo "all of it: $out"
exit $failed
