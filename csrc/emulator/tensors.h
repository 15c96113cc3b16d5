// Which memory a call's kernels may touch: its tensors, and nothing else.
#pragma once

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
      matrix(args.u, args.dtype, args.M, args.rank, args.rank, 1);
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
  }
  static void noise(const NoiseArgs& noise, int64_t N) {
    matrix(noise.scale, int64_t(DType::kFloat32), 1, 0, N, noise.scale_stride);
    gpu::allow_memory(noise.seed, 8, false);
  }

  std::lock_guard<std::mutex> alone_;
};

}  // namespace flatlora
