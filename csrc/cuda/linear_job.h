// What linear_sm80.h and linear_sm90.h share.
#pragma once

#include "kernels.h"
#include "noise.h"

namespace flatlora {

struct LinearJob {
  LinearArgs args;
  int64_t outputs, length;  // columns of y, and of the contraction
  int64_t rows_per_sample, tiles_per_sample, tiles_m, tiles_n;
  int64_t parts, steps_per_part;
  float* partial;  // (parts, M, outputs) where parts > 1
  int64_t tf32;
  int64_t copies;  // rows of `a` and W can be copied in 16 bytes at 32-bit offsets
  int64_t any_row;  // rademacher: rows of W begin within a word
};

// `index` elements into `data`.
FLATLORA_DEVICE float float_at(const void* data, int64_t dtype, int64_t index) {
  if (dtype == int64_t(DType::kFloat32)) return gpu::load_global<float>(static_cast<const float*>(data) + index);
  const uint16_t bits = gpu::load_global<uint16_t>(static_cast<const uint16_t*>(data) + index);
  return dtype == int64_t(DType::kBFloat16) ? to_float(gpu::bf16{bits}) : to_float(gpu::f16{bits});
}

FLATLORA_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Sums job.partial into y; split.cu.
gpu::Error add_parts(const LinearJob& job, const Gpu& gpu);

}  // namespace flatlora
