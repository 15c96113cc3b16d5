#!/usr/bin/env bash
# All that wants a GPU, on a machine with one and no network, in 9 minutes: build, doctor, one test for each wrapper of
# PTX, every kernel against its oracle and a first time, tests, the project's targets, a training step, the table of the automatic choice, and in what time is left
# compute-sanitizer, more of the benchmark, the shared tests and the search for tiles.
#
#   bench/gpu_suite.sh [--dry-run] [PART...]
#
# Parts: build doctor wrappers truth tests targets training strategies table sanitizer bench shared tune.
# Needs python3 (or $PYTHON) with torch, triton and pytest (with pytest-xdist, tests compile their kernels on all
# cores); nvcc and cmake for the CUDA backend. Without PART all run, in that order; the first run needs build.
# Results go to $OUT, or to bench/results/<GPU>: suite.log, summary.txt, truth-{check,time}.jsonl, {targets,training,bench}.{json,csv,md},
# tune-strategies.{json,csv}, of which flatlora_kernels/tables/ gets the table, tune.{json,csv,txt}.
# PEFT's rows need peft.
# Pictures need no GPU: python -m bench plot targets.json. A part that fails or runs out of time does not stop the rest,
# but the exit status is 1 then. $SUITE_SECONDS is for all together, 525 where it is not given.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
all_parts="build doctor wrappers truth tests targets training strategies table sanitizer bench shared tune"
dry_run=false
wanted=" "
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=true ;;
    build | doctor | wrappers | truth | tests | targets | training | strategies | table | sanitizer | bench | shared | tune)
      wanted="$wanted$argument " ;;
    *) echo "usage: bench/gpu_suite.sh [--dry-run] [PART...], parts: $all_parts; got '$argument'" >&2; exit 2 ;;
  esac
done
[ "$wanted" != " " ] || wanted=" $all_parts "

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
# Tests of these fail where they would be skipped.
export FLATLORA_REQUIRE_BACKENDS=triton
if command -v nvcc > /dev/null; then FLATLORA_REQUIRE_BACKENDS=triton,cuda; fi
# One architecture builds in a fraction of the time of all.
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}

total=${SUITE_SECONDS:-525} # for all parts together; each has a limit of its own as well
failed=0
if ! $dry_run; then
  mkdir -p "$out" || exit 1
  : > "$log"
  { echo "$gpu, $(date -u +%FT%TZ), commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)"; } > "$summary"
fi

# part NAME SECONDS COMMAND: runs COMMAND, a shell line that finds the seconds it has in $limit, and notes how it ended.
part() {
  local name=$1 limit=$2 command=$3 left=$((total - SECONDS)) start=$SECONDS verdict
  case "$wanted" in *" $name "*) ;; *) return ;; esac
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
    env limit="$limit" timeout --kill-after=5 "$limit" bash -c "$command" 2>&1 | tee -a "$log"
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

# Most of the time of tests goes into compiling kernels, which several processes share.
workers=
if "$python" -c 'import xdist' 2>/dev/null; then workers="-n $(($(nproc) > 2 ? $(nproc) - 2 : 1))"; fi
pytest="'$python' -m pytest -q -m gpu -p no:cacheprovider"

part build 150 "'$python' -m pip install --no-build-isolation --no-deps -e . \
|| { cmake -S . -B build/gpu-suite && cmake --build build/gpu-suite --parallel; }"
part doctor 30 "'$python' -m flatlora_kernels"
# What no emulator can know comes first: whether each instruction does what its emulated twin does.
part wrappers 60 "$pytest tests/test_wrappers.py || $none_selected"
part truth 95 "OUT='$out' '$python' -m bench.truth check --limit 45 && OUT='$out' '$python' -m bench.truth time --limit 30"
part tests 150 "$pytest $workers --durations=5 tests/test_gpu.py || $none_selected"
bench="'$python' -m bench"
to="--device cuda --out '$out' --name"
part targets 130 "$bench --set targets --budget 0.15 --time-limit \$((limit - 25)) $to targets"
part training 80 "$bench training --budget 2 $to training"
part strategies 100 "$bench tune --strategies --quick --time-limit \$((limit - 25)) $to tune-strategies"
part table 15 "for run in targets training; do [ ! -e '$out'/\$run.json ] || \
$bench table '$out'/\$run.json > '$out'/\$run.md || exit; done"
# Without torch's own cache of memory, each tensor ends where its allocation ends. The tests ran before: nothing is
# compiled here.
sanitizer="PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool"
part sanitizer 100 "command -v compute-sanitizer || { echo 'compute-sanitizer is not installed'; exit 77; }; failed=0; \
$sanitizer memcheck $pytest tests/test_gpu.py -k '(unaligned and bfloat16 and (all or odd)) or small_shapes' || failed=1; \
for tool in racecheck synccheck initcheck; do \
$sanitizer \$tool $pytest tests/test_gpu.py -k 'cuda and small_shapes and bfloat16' || failed=1; done; exit \$failed"
part bench 170 "$bench --set square4096 --budget 0.15 --time-limit \$((limit - 25)) $to bench \
&& $bench table '$out/bench.json' > '$out/bench.md'"
part shared 150 "$pytest $workers --durations=5 --ignore=tests/test_gpu.py tests || $none_selected"
# shellcheck disable=SC2016 # for the shell of the part
part tune 300 '[ "$limit" -ge 60 ] || { echo "only $limit s left, it needs 60"; exit 77; }; '"set -o pipefail; \
$bench tune --time-limit \$((limit - 25)) --out '$out' --name tune | tee '$out/tune.txt'"

$dry_run && { echo "results would go to $out"; exit 0; }
printf '\n'
cat "$summary"
echo "all of it: $out"
exit $failed
