#include "kernels.h"
#include "perturb.h"

namespace flatlora {
namespace {

template <class T>
bool whole_chunks(const PerturbArgs& args, const void* data, int64_t row_stride, int64_t col_stride) {
  const int64_t row_bytes = args.N == 1 ? 0 : row_stride * int64_t(sizeof(T));
  return col_stride == 1 && args.K % 8 == 0 && row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

template <class T, Noise kind>
gpu::Error run(const PerturbArgs& args, const Gpu& gpu) {
  const int64_t chunks = (args.K + 7) / 8;
  const int64_t warps = (args.N + 3) / 4 * ((chunks + 32 * kPerturbSteps - 1) / (32 * kPerturbSteps));
  gpu::Launch how = {};
  how.blocks = (warps + kPerturbThreads / 32 - 1) / (kPerturbThreads / 32);
  how.threads = kPerturbThreads;
  how.stream = gpu.stream;
  how.cluster = 1;
  const WeightArgs& w = args.weight;
  const bool vector = args.noise.row_offset % 4 == 0 &&
                      whole_chunks<T>(args, args.out, args.out_row_stride, args.out_col_stride) &&
                      (w.data == nullptr || whole_chunks<T>(args, w.data, w.row_stride, w.col_stride));
  return gpu::launch(vector ? perturb_kernel<T, kind, true> : perturb_kernel<T, kind, false>, how, args);
}

template <class T>
gpu::Error run(const PerturbArgs& args, const Gpu& gpu) {
  return args.noise.kind == int64_t(Noise::kGaussian) ? run<T, Noise::kGaussian>(args, gpu)
                                                      : run<T, Noise::kRademacher>(args, gpu);
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
