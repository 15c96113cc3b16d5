// Which memory a call's kernels may touch: its tensors, and nothing else.
#pragma once

#include <algorithm>
#include <mutex>

#include "../cuda/kernels.h"

namespace flatlora {

// Allows until the end of the scope, and keeps other threads of the host from the one machine there is.
class Tensors {
 public:
  Tensors() : alone_(machine()) {}
  Tensors(const Tensors&) = delete;
  ~Tensors() { gpu::forget_memory(); }

  void allow(const LinearArgs& args, const Gpu& gpu) {
    const int64_t inner = args.input_grad ? args.N : args.K, outputs = args.input_grad ? args.K : args.N;
    matrix(args.a, args.dtype, args.M, args.a_row_stride, inner, args.a_col_stride);
    weight(args.weight, args.dtype, args.N, args.K);
    if (args.rank > 0) {
      matrix(args.u, args.dtype, args.M, args.rank, args.rank, 1, args.lora_A != nullptr);
      matrix(args.lora_A, args.dtype, args.rank, args.lora_A_stride, args.K, 1);
      matrix(args.lora, args.lora_dtype, outputs, args.lora_out_stride, args.rank, args.lora_rank_stride);
    }
    matrix(args.bias, args.bias_dtype, 1, 0, outputs, args.bias_stride);
    matrix(args.y, args.dtype, args.M, outputs, outputs, 1, true);
    if (gpu.workspace != nullptr) gpu::allow_memory(gpu.workspace, gpu.workspace_bytes, true);
    noise(args.noise, args.N);
  }
  void allow(const RowNormsArgs& args, const Gpu&) {
    weight(args.weight, args.dtype, args.N, args.K);
    if (args.rank > 0) {
      matrix(args.lora_A, args.A_dtype, args.rank, args.A_rank_stride, args.K, args.A_col_stride);
      matrix(args.lora_B, args.B_dtype, args.N, args.B_row_stride, args.rank, args.B_rank_stride);
    }
    matrix(args.out, int64_t(DType::kFloat32), 1, 0, args.N, 1, true);
  }
  void allow(const PerturbArgs& args, const Gpu&) {
    weight(args.weight, args.dtype, args.N, args.K);
    matrix(args.out, args.dtype, args.N, args.out_row_stride, args.K, args.out_col_stride, true);
    noise(args.noise, args.N);
  }
  void allow(const TransformArgs& args, const Gpu&) {
    const int64_t inner = args.input_grad ? args.N : args.K, outputs = args.input_grad ? args.K : args.N;
    matrix(args.a, args.dtype, args.M, args.a_row_stride, inner, args.a_col_stride);
    matrix(args.y, args.dtype, args.M, outputs, outputs, 1, true);
    noise(args.noise, args.N);
  }

 private:
  static std::mutex& machine() {
    static std::mutex mutex;
    return mutex;
  }
  // Sizes are positive, strides not negative. What lies between the rows is allowed too.
  static void matrix(const void* data, int64_t dtype, int64_t rows, int64_t row_stride, int64_t columns,
                     int64_t column_stride, bool write = false) {
    if (data == nullptr) return;
    const int64_t size = dtype == int64_t(DType::kFloat32) ? 4 : 2;
    gpu::allow_memory(data, size * ((rows - 1) * row_stride + (columns - 1) * column_stride + 1), write);
  }
  static void weight(const WeightArgs& w, int64_t dtype, int64_t N, int64_t K) {
    matrix(w.data, dtype, N, w.row_stride, K, w.col_stride);
    if (w.packed != nullptr) packed(*w.packed, N, K);
  }
  static void packed(const PackedArgs& p, int64_t N, int64_t K) {
    const auto most = [&](const int64_t* rows, const int64_t* cols) {  // the largest sum, and both may be read
      gpu::allow_memory(rows, 8 * (p.row + N), false);
      gpu::allow_memory(cols, 8 * (p.col + K), false);
      return *std::max_element(rows + p.row, rows + p.row + N) + *std::max_element(cols + p.col, cols + p.col + K);
    };
    const auto size = [](int64_t dtype) {
      return dtype == int64_t(DType::kByte) ? 1 : dtype == int64_t(DType::kFloat32) ? 4 : 2;
    };
    const int64_t row = p.row + N - 1, col = p.col + K - 1;
    int64_t index;
    if (p.row_bits != nullptr) {
      most(p.row_bits, p.col_bits);
      index = most(p.row_scales, p.col_scales);
    } else {
      index = p.block ? (row * p.width + col) / p.block : row / p.block_rows * p.scale_stride + col / p.block_cols;
    }
    gpu::allow_memory(p.codes, p.bytes, false);
    gpu::allow_memory(p.table, int64_t(4) << p.bits, false);
    gpu::allow_memory(p.scale, size(p.scale_dtype) * (index + 1), false);
    if (p.scale_table != nullptr) gpu::allow_memory(p.scale_table, 4 * 256, false);
    if (p.nested != nullptr) gpu::allow_memory(p.nested, 4 * (index / p.nested_block + 1), false);
    if (p.offset != nullptr) gpu::allow_memory(p.offset, 4, false);
    if (p.zero_bits)
      gpu::allow_memory(p.zero, (most(p.row_zeros, p.col_zeros) + p.zero_bits + 7) / 8, false);
    else if (p.zero != nullptr)
      gpu::allow_memory(p.zero, size(p.zero_dtype) * (index + 1), false);
  }
  static void noise(const NoiseArgs& noise, int64_t N) {
    matrix(noise.scale, int64_t(DType::kFloat32), 1, 0, N, noise.scale_stride);
    gpu::allow_memory(noise.seed, 8, false);
  }

  std::lock_guard<std::mutex> alone_;
};

}  // namespace flatlora
