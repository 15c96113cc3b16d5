#include "kernels.h"
#include "perturb.h"

namespace flatlora {
namespace {

template <class T>
bool whole_chunks(const PerturbArgs& args, const void* data, int64_t row_stride, int64_t col_stride) {
  const int64_t row_bytes = args.N == 1 ? 0 : row_stride * int64_t(sizeof(T));
  return col_stride == 1 && args.K % 8 == 0 && row_bytes % 16 == 0 && row_bytes >= 0 && row_bytes < int64_t(1) << 32 &&
         reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Whether W begins where the patches of the kernel with vectors may.
bool patches_fit(const NoiseArgs& noise) {
  switch (static_cast<Noise>(noise.kind)) {
    case Noise::kRademacher: return noise.row_offset % 16 == 0;  // all rows of a call
    case Noise::kHadamard: return noise.row_offset % 4 == 0 && noise.tile_bits >= 3;
    default: return begins_whole(noise);
  }
}

template <class T, Noise kind, bool kVector>
gpu::Error launch(const PerturbArgs& args, const Gpu& gpu) {
  constexpr int kWarps = kPerturbThreads / 32;
  gpu::Launch how = {};
  how.blocks = (PerturbShape<kind, kVector>::items(args.N, args.K) + kWarps - 1) / kWarps;
  how.threads = kPerturbThreads;
  how.stream = gpu.stream;
  how.cluster = 1;
  const int64_t size = sizeof(T);
  const PerturbJob job = {args, uint32_t(args.weight.row_stride * size), uint32_t(args.out_row_stride * size)};
  return gpu::launch(perturb_kernel<T, kind, kVector>, how, job);
}

template <class T, Noise kind>
gpu::Error run(const PerturbArgs& args, const Gpu& gpu) {
  const WeightArgs& w = args.weight;
  const bool vector = patches_fit(args.noise) &&
                      whole_chunks<T>(args, args.out, args.out_row_stride, args.out_col_stride) &&
                      (w.data == nullptr || whole_chunks<T>(args, w.data, w.row_stride, w.col_stride));
  return vector ? launch<T, kind, true>(args, gpu) : launch<T, kind, false>(args, gpu);
}

template <class T>
gpu::Error run(const PerturbArgs& args, const Gpu& gpu) {
  switch (static_cast<Noise>(args.noise.kind)) {
    case Noise::kGaussian: return run<T, Noise::kGaussian>(args, gpu);
    case Noise::kNearGaussian: return run<T, Noise::kNearGaussian>(args, gpu);
    case Noise::kHadamard: return run<T, Noise::kHadamard>(args, gpu);
    default: return run<T, Noise::kRademacher>(args, gpu);
  }
}

}  // namespace

gpu::Error perturb(const PerturbArgs& args, const Gpu& gpu) {
  switch (static_cast<DType>(args.dtype)) {
    case DType::kBFloat16: return run<gpu::bf16>(args, gpu);
    case DType::kFloat16: return run<gpu::f16>(args, gpu);
    default: return run<float>(args, gpu);
  }
}

}  // namespace flatlora
