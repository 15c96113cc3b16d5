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
  // linear_sm90: from row to row of W, to the other row of a unit, and to a thread's next step. Products made by the
  // host, because the compiler would spread them over the loop.
  int64_t row_bytes, unit_bytes, turn_bytes;
  int64_t any;  // W does not begin where patches of the noise may
};

FLATLORA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FLATLORA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sums job.partial into y; split.cu.
gpu::Error add_parts(const LinearJob& job, const Gpu& gpu);

}  // namespace flatlora
