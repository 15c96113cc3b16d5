#include "kernels.h"
#include "transform.h"

namespace flatlora {
namespace {

// Contiguous rows that begin at multiples of 16 bytes.
bool aligned(const void* data, int64_t rows, int64_t row_bytes) {
  return (rows == 1 || row_bytes % 16 == 0) && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Whether 16 neighbours within a tile are there or not as a whole, and lie aligned.
bool in_sixteens(const TransformArgs& args, int64_t size) {
  const NoiseArgs& noise = args.noise;
  const int64_t outputs = args.input_grad ? args.K : args.N;
  return (args.N | args.K | noise.row_offset | noise.col_offset) % 16 == 0 && args.a_col_stride == 1 &&
         aligned(args.a, args.M, args.a_row_stride * size) && aligned(args.y, args.M, outputs * size) &&
         noise.scale_stride == 1 && aligned(noise.scale, 1, 0);
}

template <class T, int kBits>
gpu::Error launch(gpu::Launch how, const TransformArgs& args) {
  how.threads = Walsh<kBits>::kThreads;
  how.shared_bytes = Walsh<kBits>::kBytes;
  const bool vector = in_sixteens(args, sizeof(T));
  return gpu::launch(vector ? transform_kernel<T, kBits, true> : transform_kernel<T, kBits, false>, how, args);
}

template <class T>
gpu::Error run(const TransformArgs& args, const Gpu& gpu) {
  const NoiseArgs& noise = args.noise;
  const int64_t first = args.input_grad ? noise.col_offset : noise.row_offset;
  const int64_t outputs = args.input_grad ? args.K : args.N;
  gpu::Launch how = {};
  how.blocks = args.M * TransformBlock::tiles_of(uint32_t(first), outputs, int(noise.tile_bits));
  how.stream = gpu.stream;
  how.cluster = 1;
  switch (noise.tile_bits) {
    case 9: return launch<T, 9>(how, args);
    case 10: return launch<T, 10>(how, args);
    case 11: return launch<T, 11>(how, args);
    case 12: return launch<T, 12>(how, args);
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
