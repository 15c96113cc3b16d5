#include "transform.h"

#include "kernels.h"

namespace flatlora {
namespace {

// Rows that begin at multiples of 16 bytes, as pieces of 16 elements of the tiles do.
template <class T>
bool in_pieces(const void* data, int64_t rows, int64_t row_stride, int64_t col_stride, int64_t first) {
  const int64_t size = sizeof(T), row_bytes = rows == 1 ? 0 : row_stride * size;
  return col_stride == 1 && row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && first * size % 16 == 0;
}

template <class T, int kBits>
gpu::Error launch(gpu::Launch how, const TransformArgs& args, bool in, bool out) {
  how.threads = Walsh<kBits>::kThreads;
  how.shared_bytes = Walsh<kBits>::kBytes;
  return gpu::launch(transform_kernel<T, kBits>, how, args, in, out);
}

template <class T>
gpu::Error run(const TransformArgs& args, const Gpu& gpu) {
  const NoiseArgs& noise = args.noise;
  const bool backward = args.input_grad != 0;
  const int64_t in_first = backward ? noise.row_offset : noise.col_offset;
  const int64_t out_first = backward ? noise.col_offset : noise.row_offset, outputs = backward ? args.K : args.N;
  gpu::Launch how = {};
  how.blocks = args.M * TransformBlock::tiles_of(uint32_t(out_first), outputs, int(noise.tile_bits));
  how.stream = gpu.stream;
  how.cluster = 1;
  const bool in = in_pieces<T>(args.a, args.M, args.a_row_stride, args.a_col_stride, in_first);
  const bool out = in_pieces<T>(args.y, args.M, outputs, 1, out_first);
  static_assert(kFirstWalsh == 9 && kLastWalsh == 12);
  switch (noise.tile_bits) {
    case 9: return launch<T, 9>(how, args, in, out);
    case 10: return launch<T, 10>(how, args, in, out);
    case 11: return launch<T, 11>(how, args, in, out);
    case 12: return launch<T, 12>(how, args, in, out);
    default: break;
  }
  how.threads = noise.tile_bits < 5 ? 32 : 1 << noise.tile_bits;
  how.shared_bytes = 2 * 4 * kSmallWalsh;
  return gpu::launch(transform_small_kernel<T>, how, args);
}

}  // namespace

gpu::Error transform(const TransformArgs& args, const Gpu& gpu) {
  switch (static_cast<DType>(args.dtype)) {
    case DType::kBFloat16: return run<gpu::bf16>(args, gpu);
    case DType::kFloat16: return run<gpu::f16>(args, gpu);
    default: return run<float>(args, gpu);
  }
}

}  // namespace flatlora
