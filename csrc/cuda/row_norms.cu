#include "kernels.h"
#include "row_norms.h"

namespace flatlora {
namespace {

// Rows are contiguous, begin at multiples of `bytes` and have a multiple of `bytes`.
template <class T>
bool in_steps_of(int bytes, const RowNormsArgs& args) {
  const int64_t row = args.N == 1 ? 0 : args.weight.row_stride, size = sizeof(T);
  return args.weight.col_stride == 1 && args.K * size % bytes == 0 && row * size % bytes == 0 &&
         reinterpret_cast<uintptr_t>(args.weight.data) % uintptr_t(bytes) == 0;
}

template <class T>
gpu::Error run(const RowNormsArgs& args, const Gpu& gpu) {
  gpu::Launch how = {};
  how.stream = gpu.stream;
  how.cluster = 1;
  if (args.rank == 0 && args.weight.packed == nullptr && in_steps_of<T>(16, args)) {
    how.blocks = (args.N + kNormThreads / 32 - 1) / (kNormThreads / 32);
    how.threads = kNormThreads;
    return gpu::launch(row_norms_kernel<T>, how, args);
  }
  how.blocks = (args.N + kNormRows - 1) / kNormRows;
  how.threads = kNormTileThreads;
  how.shared_bytes = NormShared::kBytes;
  if (args.weight.packed != nullptr)
    return gpu::launch(row_norms_packed_kernel, how, args, packed_of(*args.weight.packed));
  const bool vector = in_steps_of<T>(4 * int(sizeof(T)), args);
  return gpu::launch(vector ? row_norms_tile_kernel<T, true> : row_norms_tile_kernel<T, false>, how, args);
}

}  // namespace

gpu::Error row_sq_norms(const RowNormsArgs& args, const Gpu& gpu) {
  switch (static_cast<DType>(args.dtype)) {
    case DType::kBFloat16: return run<gpu::bf16>(args, gpu);
    case DType::kFloat16: return run<gpu::f16>(args, gpu);
    default: return run<float>(args, gpu);
  }
}

}  // namespace flatlora
