#!/usr/bin/env bash
# Builds here what would cost minutes on a GPU's machine, and prints the call to make there:
#
#   bench/gpu_pack.sh [--arch 9.0] [FOLDER]
#
# FOLDER, default build/gpu-pack, where bench/gpu_suite.sh looks: libflatlora_cuda.so, wrappers.so, Triton's cache,
# pack.json. $PYTHON must have the versions of the GPU's machine: $PACK_PYTHON, $PACK_TORCH and $PACK_TRITON, default 3.12,
# 2.11 and 3.6.0. Needs nvcc, cmake and gcc, and no GPU. Triton kernels of tests/ alone are left to that machine.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
arch=9.0
if [ "${1:-}" = --arch ]; then arch=${2:?--arch: expected a compute capability, for example 9.0}; shift 2; fi
folder=${1:-build/gpu-pack}
export PYTHONPATH="$PWD" PATH="$PATH:/usr/local/cuda/bin" TORCH_CUDA_ARCH_LIST=$arch
export TRITON_CACHE_DIR=${PACK_CACHE:-/tmp/flatlora-gpu-pack} # the same there: files in it name each other

read -ra wanted <<< "${PACK_PYTHON:-3.12} ${PACK_TORCH:-2.11} ${PACK_TRITON:-3.6.0}"
read -ra found < <("$python" -c 'import platform, torch, triton
print(platform.python_version(), torch.__version__, triton.__version__)')
for i in 0 1 2; do
  case "${found[i]:-}." in "${wanted[i]}"[.+]*) continue ;; esac
  echo "gpu_pack: expected Python, torch, Triton ${wanted[*]} (PACK_PYTHON, PACK_TORCH, PACK_TRITON);" \
    "'$python' has ${found[*]:-none}" >&2
  exit 2
done

rm -rf "$folder" "$TRITON_CACHE_DIR"
mkdir -p "$folder"
start=0
took() { echo "$1: $((SECONDS - start)) s"; start=$SECONDS; }
built=build/gpu-pack-cmake
cmake -S . -B $built -DFLATLORA_BUILD=cuda -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/$built/lib" > "$folder/cmake.log"
cmake --build $built --target flatlora_cuda --parallel "${MAX_JOBS:-$(nproc)}" >> "$folder/cmake.log"
rm "$folder/cmake.log"
cp $built/lib/libflatlora_cuda.so "$folder"
took "CUDA library"
case $arch in 9.0) code=90a ;; *) code=${arch/./} ;; esac
"$python" -c 'import sys; sys.path.insert(0, "tests"); import wrappers
done = wrappers.nvcc(sys.argv[1], "-shared", "-o", sys.argv[2]); sys.exit(done.stderr if done.returncode else 0)' \
  $code "$folder/wrappers.so"
took wrappers
"$python" -m bench.gpu.pack triton --arch "$arch" --part 0/2 & first=$!
"$python" -m bench.gpu.pack triton --arch "$arch" --part 1/2
wait "$first"
tar -C "$TRITON_CACHE_DIR" -cJf "$folder/triton.tar.xz" .
took "Triton's cache"
"$python" -m bench.gpu.pack seal "$folder" --arch "$arch"

du -h "$folder"/*
size=$(($(du -sk "$folder" | cut -f 1) / 1024))
[ "$size" -lt 64 ] || { echo "gpu_pack: expected less than 64 MiB, got $size" >&2; exit 1; }
echo "$size MiB. On the GPU's machine, in this folder, with $folder along, one of"
for stage in truth correctness numbers sanitizer; do echo "    bench/gpu_suite.sh $stage"; done
