// What Python passes: structs of 8-byte fields, packed by flatlora_kernels/backends/shared/arguments.py in this order.
// Strides are in elements. Sizes are checked in Python.
#pragma once

#include <cstdint>

namespace flatlora {

enum class DType : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kByte = 4 };

struct NoiseArgs {
  int64_t kind;  // enum Noise
  const float* scale;  // (N,)
  int64_t scale_stride;
  const int64_t* seed;
  int64_t stream, samples, sample_offset, antithetic, row_offset, col_offset;
  int64_t tile_bits;  // of kHadamard
};

// A packed weight; the meaning of every field is that of flatlora_kernels/core/quantized.py. Null where there is none.
struct PackedArgs {
  const uint8_t* codes;
  int64_t bytes;  // of codes
  int64_t bits;
  int64_t number;  // enum Number
  int64_t row, col, width;
  int64_t high_first;
  const float* table;  // (2^bits,)
  const void* scale;
  int64_t scale_dtype;  // enum DType; kByte = looked up in scale_table
  const float* scale_table;
  const float* nested;
  int64_t nested_block;
  const float* offset;
  int64_t block, block_rows, block_cols, scale_stride;
  const void* zero;
  int64_t zero_dtype;  // of zeros indexed as the scale
  int64_t zero_bits, zero_plus;
  const int64_t *row_bits, *col_bits, *row_scales, *col_scales, *row_zeros, *col_zeros;  // null = flat
  int64_t difference_dtype;  // what table[code] - zero is rounded to
  int64_t dtype;             // what a value is rounded to before the type of the call
  double post;
};

enum class Number : int64_t { kTable = 0, kInt8 = 1, kUint = 2, kE4M3 = 3, kE5M2 = 4 };

struct WeightArgs {
  const void* data;  // (N, K); null = zeros, unless packed
  int64_t row_stride, col_stride;
  const PackedArgs* packed;  // on the host; null = `data` has the values
};

// y = a P^T + scaling u L^T + bias, with P = W + eps and L = lora_B (forward, a = x), or P = (W + eps)^T and
// L = lora_A^T (input gradient, a = dY).
struct LinearArgs {
  int64_t input_grad, dtype;
  int64_t M, N, K, rank;
  const void* a;  // (M, K), or (M, N)
  int64_t a_row_stride, a_col_stride;
  WeightArgs weight;
  void* u;  // (M, rank) of `dtype`, contiguous; written where lora_A is given
  const void* lora_A;  // (rank, K) of `dtype`, columns contiguous, or null: u is given
  int64_t lora_A_stride;
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
