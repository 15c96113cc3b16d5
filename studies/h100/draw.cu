#include <cuda_runtime.h>
#include "../csrc/cuda/device.h"
#include "../csrc/cuda/noise.h"
using namespace flatlora;
template <int kRows, bool kGauss>
__global__ void __launch_bounds__(512, 1) draw_kernel(uint32_t* out, NoiseArgs args, int n, long long* clocks) {
  const Draw draw = draw_of(args, 0);
  Chunk<gpu::bf16> w[kRows];
  for (int i = 0; i < kRows; ++i) for (int q = 0; q < 4; ++q) w[i].v[q] = threadIdx.x * 77 + q;
  const uint32_t row = threadIdx.x / 8 * kRows;
  const long long t0 = clock64();
#pragma unroll 1
  for (int it = 0; it < n; ++it) {
    const BlockKey block = block_key(draw, it * 8 + threadIdx.x % 8);
    if constexpr (kGauss) {
      RowKey key[kRows];
      for (int i = 0; i < kRows; ++i) key[i] = row_key(draw, row + i);
      uint32_t words[kRows][4];
      philox(draw, key, block, words);
      for (int i = 0; i < kRows; ++i) add_gaussian<gpu::bf16>(w[i], words[i], 0.01f);
    } else if constexpr (kRows == 4) {
      const RowKey key[1] = {row_key(draw, row >> 4)};
      uint32_t words[1][4];
      philox(draw, key, block, words);
      const float f[4] = {0.01f, 0.02f, 0.03f, 0.04f};
      add_rademacher<gpu::bf16>(w, rademacher_word(words[0], row), f);
    }
  }
  const long long t1 = clock64();
  uint32_t x = 0;
  for (int i = 0; i < kRows; ++i) for (int q = 0; q < 4; ++q) x ^= w[i].v[q];
  out[blockIdx.x * blockDim.x + threadIdx.x] = x;
  if (threadIdx.x == 0 && blockIdx.x == 0) *clocks = t1 - t0;
}
extern "C" long long draw_time(int rows, int gauss, int threads, int n) {
  static uint32_t* out = nullptr; static long long* clocks; static int64_t* seed; static float* scale;
  if (!out) { cudaMalloc(&out, 4 << 20); cudaMalloc(&clocks, 8); cudaMalloc(&seed, 8); cudaMemset(seed, 7, 8); cudaMalloc(&scale, 4096); }
  NoiseArgs a = {}; a.kind = gauss ? int64_t(Noise::kGaussian) : int64_t(Noise::kRademacher); a.seed = seed; a.scale = scale; a.scale_stride = 1; a.samples = 1;
  for (int r = 0; r < 2; ++r) {
    if (gauss) { if (rows == 1) draw_kernel<1, true><<<132, threads>>>(out, a, n, clocks); if (rows == 2) draw_kernel<2, true><<<132, threads>>>(out, a, n, clocks); if (rows == 4) draw_kernel<4, true><<<132, threads>>>(out, a, n, clocks); }
    else draw_kernel<4, false><<<132, threads>>>(out, a, n, clocks);
  }
  long long t = -1; cudaError_t e = cudaMemcpy(&t, clocks, 8, cudaMemcpyDeviceToHost); return e ? -int(e) : t;
}
