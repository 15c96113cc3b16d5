#!/usr/bin/env bash
# All that wants a GPU, on a machine with one and no network, in stages of at most four minutes, what says most first:
#
#   bench/gpu_suite.sh [--dry-run] [STAGE|PART...]
#
#   truth        150 s  driver wrappers check time: each instruction, each kernel's values, first times
#   correctness  200 s  cuda large triton: the tests; large are tensors of more than 2^31 elements
#   numbers      230 s  targets strategies-cuda strategies-triton quantized training-cuda training-triton
#   mixture       40 s  experts in one launch, one after the other, and the vendor's grouped product
#   evidence     240 s  examples/vit.py, a row a run: what noise does to accuracy, for docs/evidence.md
#   sanitizer    100 s  each instruction again, under compute-sanitizer
#
# Without an argument all stages run. Each can be repeated alone, each part too. Needs python3 (or $PYTHON) with torch,
# triton, numpy and pytest. What bench/gpu_pack.sh built is taken from build/gpu-pack (or $SUITE_PACK);
# where that is not, the package is installed (pip, cmake, nvcc). $SUITE_SECONDS is for all together. --dry-run does
# everything on the CPU, tiny, in the emulator that `make emulator` builds: no time means anything there. evidence needs
# what `python -m bench.gpu.pack evidence build/gpu-evidence` (or $SUITE_EVIDENCE) put there, and is skipped without.
#
# Results go to $OUT, or to bench/results/<GPU>, at most 8 files of a stage, as they are found: summary.txt (its first line
# says where to look first), suite.log, {wrappers,cuda,large,triton}.jsonl, truth-{check,time}.jsonl, and a JSON to each
# part of numbers. A part that fails or runs out of time stops no other; then the exit status is 1. One for which no time
# was left is no failure. Pictures need no GPU: python -m bench plot targets.json; nor does the table of the automatic
# choice: python -m bench tune --strategies --rows strategies-cuda.json strategies-triton.json.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
truth="driver wrappers check time"
correctness="cuda large triton"
numbers="targets strategies-cuda strategies-triton quantized training-cuda training-triton"
all="setup $truth $correctness $numbers mixture evidence sanitizer"
dry_run=false
wanted=
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=true ;;
    truth | correctness | numbers) wanted="$wanted ${!argument}" ;;
    *) case " $all " in
      *" $argument "*) wanted="$wanted $argument" ;;
      *) echo "gpu_suite: expected truth, correctness, numbers or of $all; got '$argument'" >&2; exit 2 ;;
    esac ;;
  esac
done
wanted=" ${wanted:-$all} "

export PATH="$PATH:/usr/local/cuda/bin" # where nvcc and compute-sanitizer often are
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1
gpu="dry run"
if ! $dry_run; then
  gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
  [ -n "$gpu" ] || { echo "gpu_suite: torch in '$python' sees no GPU; --dry-run needs none" >&2; exit 2; }
  export FLATLORA_REQUIRE_BACKENDS=triton,cuda # tests of these fail where they would be skipped
fi
out=${OUT:-bench/results/$(printf %s "$gpu" | tr -cs 'A-Za-z0-9.\n' '-')}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
export OUT=$out
log=$out/suite.log
summary=$out/summary.txt
declare -A rows # of the summary, by part
for name in $all; do rows[$name]=$(grep "^$name  " "$summary" 2> /dev/null); done # of earlier calls
about="$gpu, $(date -u +%FT%TZ), commit $(git rev-parse --short=12 HEAD 2> /dev/null || echo unknown)"
printf '\n### %s: %s\n' "$about" "$wanted" >> "$log"

# Rewrites the summary, with part NAME as it ended.
note() {
  local name lines first
  rows[$1]="$1  $2"
  echo "${rows[$1]}"
  # In the order of $all: what a later part says follows from what an earlier one found.
  lines=$(for name in $all; do [ -z "${rows[$name]}" ] || echo "${rows[$name]}"; done)
  first=$(grep -m 1 -E ' s: (FAILED|ran out)' <<< "$lines")
  printf '%s\n' "${first:+LOOK FIRST AT }${first:-nothing failed in what ran}" "$about" "$lines" > "$summary"
}

failed=0
packed= # entries in Triton's cache, where it is the pack's
total=${SUITE_SECONDS:-100000}
stage() { # SECONDS: of the parts that follow, together
  end=$((SECONDS + $1))
  [ "$end" -le "$total" ] || end=$total
}

# part NAME SECONDS COMMAND: runs COMMAND, a shell line that finds the seconds it has in $limit, and notes how it ended.
part() {
  local name=$1 limit=$2 command=$3 left=$((end - SECONDS)) start=$SECONDS verdict from said count
  case "$wanted" in *" $name "*) ;; *) return ;; esac
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    note "$name" "0 s: not run, no time left"
    return
  fi
  printf '\n=== %s, at most %d s: %s\n' "$name" "$limit" "$command" >> "$log"
  from=$(wc -l < "$log")
  # Into the file and no pipe: a process that hangs in the driver would keep a pipe open.
  limit=$limit timeout --kill-after=5 "$limit" bash -c "$command" >> "$log" 2>&1
  case $? in
    0) verdict=passed ;;
    75) verdict="passed as far as its time went" ;;
    77) verdict=skipped ;;
    124 | 137) verdict="ran out of its $limit s"; failed=1 ;;
    *) verdict=FAILED; failed=1 ;;
  esac
  rm -f "$out"/*.csv "$out"/*.unfinished # the JSON has the same rows
  said=$(tail -n +$((from + 1)) "$log" | grep . | tail -n 1 | cut -c 1-300)
  if [ -n "$packed" ] && count=$(ls "$TRITON_CACHE_DIR" | wc -l) && [ "$count" -gt "$packed" ]; then
    said="$said; new in Triton's cache: $((count - packed))"
    packed=$count
  fi
  note "$name" "$((SECONDS - start)) s: $verdict: $said"
}

# --- what runs, on a GPU or dry ---
device=cuda backends="cuda:cuda triton:triton" # a part's name, and the backend
pytest="'$python' -m bench.gpu.tests"
cores=$(nproc)
workers=$((cores > 15 ? 14 : cores > 2 ? cores - 2 : 1))
each=60 # seconds for a family of kernels, which Triton may have to compile
on_gpu="-m gpu" of_cuda="-m gpu tests -k 'not two_to_the_31'" of_large="-m gpu tests/backends/test_gpu.py -k two_to_the_31"
of_triton=$of_cuda
check= few_cases='$((limit - 20))' rows_of_x=16,256,2048,8192
times="--budget 0.012 --only '^(lora|(triton|cuda) (y|dX)|panel (triton|cuda) (y|dX)|perturb (triton|cuda) y)\$'"
targets="--set targets --budget 0.04 --providers auto plain lora peft perturb inplace"
training="--budget 1 --providers plain lora peft inplace"
quantized="--size 4096 --dtypes bfloat16 --m 16 2048 256 8192 --noise gaussian rademacher hadamard --budget 0.012"
quantized="$quantized --ways dense op {decode,fused,panel}:{cuda,triton}"
mixture="--n 4096 --k 4096 --m 128 1024 4096 --routings falling --dtypes bfloat16 --noise gaussian rademacher --budget 0.012"
mixture="$mixture --ways vendor materialised op loop {op,loop}:triton"
evidence="--method lora flat-lora --sigma 0.15 0.3 --shots 20 --steps 100 --batch-size 16 --lr 2e-3 --seeds 40 --backend cuda"
tools="memcheck racecheck synccheck initcheck"
if $dry_run; then
  export FLATLORA_EMULATE=90
  tools="memcheck racecheck" # each starts anew
  device=cpu backends="cuda:cpu triton:reference" workers=2
  on_gpu="-k emulated" of_cuda="-m emulator tests/backends/test_gpu.py -k noise_is_that"
  of_large="-m emulator tests/backends/test_gpu.py -k 'two_to_the_31 and rademacher'"
  of_triton="-m interpreter tests/backends/test_gpu.py -k copy_engine_reads"
  check="--only 'cuda (few|packed nf4)'" few_cases=0.1 rows_of_x=16 times="--ranks 0 --budget 0 --only '^cuda y'"
  targets="--set square2048 --m 1 --dtypes float32 --modes forward --rank 0 --noise rademacher --budget 0 --min-rounds 1"
  targets="$targets --providers fused:reference"
  training="--size tiny --dtypes float32 --noise rademacher --budget 0 --min-rounds 1 --no-memory --providers plain"
  quantized="--size 64 --m 16 --noise rademacher --budget 0 --ways dense op {decode,fused,panel}:{cpu,reference}"
  mixture="--n 64 --k 64 --m 16 --experts 3 --dtypes float32 --modes forward --budget 0"
  evidence="--random-weights --method lora --shots 1 --steps 1 --batch-size 4 --test-limit 5 --size 14 --seeds 1"
  evidence="$evidence --first-block 11 --backend cpu"
fi

end=300
pack=${SUITE_PACK:-$PWD/build/gpu-pack}
$dry_run || wanted="$wanted setup "
if $dry_run; then :
elif [ -e "$pack" ]; then
  export FLATLORA_WRAPPERS=$pack/wrappers.so TRITON_CACHE_DIR=${PACK_CACHE:-/tmp/flatlora-gpu-pack}
  part setup 60 "'$python' -m bench.gpu.pack unpack '$pack'"
  if [ "$failed" = 0 ] && [[ ${rows[setup]} != *"compiles its kernels here"* ]]; then
    export BENCH_PROCESSES=0 # nothing is left to compile
    each=30
    packed=$(ls "$TRITON_CACHE_DIR" | wc -l)
  fi
else
  # One architecture builds in a fraction of the time of all.
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch
print("%d.%d" % torch.cuda.get_device_capability())')}
  export TORCH_CUDA_ARCH_LIST
  part setup 300 "FLATLORA_BUILD=cuda '$python' -m pip install --no-build-isolation --no-deps -e ."
fi
[ "$failed" = 0 ] || { cat "$summary"; exit 1; } # every part would fail of it

stage 150
part driver 25 "'$python' -m flatlora_kernels && '$python' -m bench.truth driver"
# What no emulator can know: whether each instruction does what its emulated twin does.
part wrappers 50 "$pytest '$out/wrappers.jsonl' --each 10 --limit \$((limit - 5)) \
$on_gpu tests/csrc/test_wrappers.py tests/csrc/test_emulator_layouts.py"
part check 90 "rm -f '$out/truth-check.jsonl'; '$python' -m bench.truth check --each $each --limit \$((limit - 10)) $check"
part time 60 "rm -f '$out/truth-time.jsonl'; '$python' -m bench.truth time --limit \$((limit - 15)) --rows $rows_of_x $times"

stage 200
part cuda 90 "$pytest '$out/cuda.jsonl' --workers $workers --limit \$((limit - 5)) --backend cuda,others $of_cuda"
part large 50 "$pytest '$out/large.jsonl' --each 40 --limit \$((limit - 5)) $of_large"
if $dry_run; then unset FLATLORA_EMULATE && export TRITON_INTERPRET=1; fi
part triton 100 "$pytest '$out/triton.jsonl' --workers $workers --limit \$((limit - 5)) --backend triton $of_triton"
unset TRITON_INTERPRET

bench="'$python' -m bench"
to="--device $device --out '$out' --name"
stage 230
# One process: what is aimed at are ratios within a round that has all rivals, and the op's own choice takes both backends.
part targets 90 "$bench run $targets --no-parts --memory none --time-limit \$((limit - 25)) $to targets"
# A process to each backend: one that breaks its CUDA context leaves the other its numbers.
for pair in $backends; do
  backend=${pair#*:}
  part strategies-${pair%:*} 45 "$bench tune --strategies --quick --backends ${backend/reference/cpu} \
--time-limit $few_cases $to strategies-${pair%:*}"
done
# Packed weights, without the libraries that own them. One process, as a round has both backends.
part quantized 45 "$bench quantized --own $quantized --no-memory --time-limit \$((limit - 10)) $to quantized"
for pair in $backends; do
  $dry_run || flatlora=flatlora:${pair#*:}
  part training-${pair%:*} 45 "$bench training $training ${flatlora:-} $to training-${pair%:*}"
done

stage 40
part mixture 40 "$bench mixture $mixture --no-memory --time-limit \$((limit - 10)) $to mixture"

stage 240
weights=${SUITE_EVIDENCE:-$PWD/build/gpu-evidence}
$dry_run || evidence="$evidence --device $device"
# Not named .csv, as those are removed. Runs that were finished before its time was over count; examples/evidence.py reads
# them as vit.csv.
part evidence 240 "[ -e '$weights' ] || $dry_run || { echo 'no weights in $weights'; exit 77; }
rm -f '$out/vit-rows.txt'
XDG_CACHE_HOME='$weights' timeout \$((limit - 5)) '$python' examples/vit.py $evidence --csv '$out/vit-rows.txt' && exit
[ \$? = 124 ] && exit 75; exit 1"

stage 100
if $dry_run; then export FLATLORA_EMULATE=90; fi
sanitizer='command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not installed"; exit 77; }
export FLATLORA_RECORD_WRAPPERS=$(mktemp -d); trap "rm -rf $FLATLORA_RECORD_WRAPPERS" EXIT; failed=0'
# racecheck does not follow the order in `turns`: __syncwarp, which is no instruction where a warp has not diverged, then
# one lane's arrival for all.
part sanitizer 100 "$sanitizer
'$python' -m pytest -q -p no:cacheprovider $on_gpu tests/csrc/test_wrappers.py tests/csrc/test_emulator_layouts.py || exit 1
for tool in $tools; do echo \$tool; without=; [ \$tool != racecheck ] || without=turns
compute-sanitizer --error-exitcode 1 --tool \$tool '$python' tests/replay.py \$FLATLORA_RECORD_WRAPPERS \$without \
|| failed=\"\$failed \$tool\"; done
[ \"\$failed\" = 0 ] && echo 'nothing found' || { echo \"found by: \${failed#0 }\"; exit 1; }"

printf '\n'
cat "$summary"
echo "all of it: $out"
exit $failed
