// What Python passes: structs of 8-byte fields, packed by flatlora_kernels/backends/shared/arguments.py in this order.
// Strides are in elements. Sizes are checked in Python.
#pragma once

#include <cstdint>

namespace flatlora {

enum class DType : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct NoiseArgs {
  int64_t kind;  // enum Noise
  const float* scale;  // (N,)
  int64_t scale_stride;
  const int64_t* seed;
  int64_t stream, samples, sample_offset, antithetic, row_offset, col_offset;
  int64_t tile_bits;  // of kHadamard
};

struct WeightArgs {
  const void* data;  // (N, K); null = zeros
  int64_t row_stride, col_stride;
};

// y = a P^T + scaling u L^T + bias, with P = W + eps and L = lora_B (forward, a = x), or P = (W + eps)^T and
// L = lora_A^T (input gradient, a = dY).
struct LinearArgs {
  int64_t input_grad, dtype;
  int64_t M, N, K, rank;
  const void* a;  // (M, K), or (M, N)
  int64_t a_row_stride, a_col_stride;
  WeightArgs weight;
  const void* u;  // (M, rank) of `dtype`, contiguous
  const void* lora;  // (outputs, rank)
  int64_t lora_dtype, lora_out_stride, lora_rank_stride;
  const void* bias;  // (outputs,) or null
  int64_t bias_dtype, bias_stride;
  void* y;  // (M, outputs), contiguous
  double scaling;
  int64_t split_noise;      // 1: x eps^T is summed beside x W^T; 0: W + eps is rounded to `dtype` first
  int64_t workspace_limit;  // bytes, for all threads together
  NoiseArgs noise;
};

struct RowNormsArgs {
  int64_t dtype, N, K, rank;
  WeightArgs weight;
  const void* lora_A;  // (rank, K)
  int64_t A_dtype, A_rank_stride, A_col_stride;
  const void* lora_B;  // (N, rank)
  int64_t B_dtype, B_row_stride, B_rank_stride;
  double scaling;
  float* out;  // (N,)
};

struct PerturbArgs {
  int64_t dtype, N, K;
  WeightArgs weight;
  void* out;  // (N, K)
  int64_t out_row_stride, out_col_stride;
  NoiseArgs noise;
};

// y = a eps^T, or a eps, of kHadamard noise.
struct TransformArgs {
  int64_t input_grad, dtype;
  int64_t M, N, K;
  const void* a;  // (M, K), or (M, N)
  int64_t a_row_stride, a_col_stride;
  void* y;      // (M, outputs), contiguous
  int64_t add;  // to what y holds
  NoiseArgs noise;
};

}  // namespace flatlora
