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
    case Noise::kNone: return true;
    case Noise::kRademacher: return noise.row_offset % 16 == 0;  // all rows of a call
    case Noise::kHadamard: return noise.row_offset % 4 == 0 && noise.tile_bits >= 3;
    default: return begins_whole(noise);
  }
}

template <Noise kind, bool kVector, class Job>
gpu::Error launch(void (*kernel)(Job), const Job& job, const Gpu& gpu, int shared_bytes = 0) {
  constexpr int kWarps = kPerturbThreads / 32;
  gpu::Launch how = {};
  how.blocks = (PerturbShape<kind, kVector>::items(job.args.N, job.args.K) + kWarps - 1) / kWarps;
  how.threads = kPerturbThreads;
  how.shared_bytes = shared_bytes;
  how.stream = gpu.stream;
  how.cluster = 1;
  return gpu::launch(kernel, how, job);
}

template <class T>
PerturbJob job_of(const PerturbArgs& args) {
  const int64_t size = sizeof(T);
  return {args, uint32_t(args.weight.row_stride * size), uint32_t(args.out_row_stride * size)};
}

template <class T, Noise kind>
gpu::Error run_packed(const PerturbArgs& args, const Gpu& gpu) {
  const PackedArgs& packed = *args.weight.packed;
  if constexpr (sizeof(T) == 2) {
    PackedRowsJob job = {job_of<T>(args), {}};
    if (patches_fit(args.noise) && whole_chunks<T>(args, args.out, args.out_row_stride, args.out_col_stride) &&
        packed_rows(packed, args.N, args.K, args.dtype, &job.packed)) {
      const auto kernel = packed.bits == 8              ? perturb_packed_rows_kernel<T, kind, 8, 4>
                          : job.packed.scale_shift == 0 ? perturb_packed_rows_kernel<T, kind, 4, 1>
                                                        : perturb_packed_rows_kernel<T, kind, 4, 4>;
      return launch<kind, true>(kernel, job, gpu, kPackedTable);
    }
  }
  const PackedJob job = {job_of<T>(args), packed_of(packed)};
  return launch<kind, false>(perturb_packed_kernel<T, kind>, job, gpu);
}

template <class T, Noise kind>
gpu::Error run(const PerturbArgs& args, const Gpu& gpu) {
  const WeightArgs& w = args.weight;
  if (w.packed != nullptr) return run_packed<T, kind>(args, gpu);
  const bool vector = patches_fit(args.noise) &&
                      whole_chunks<T>(args, args.out, args.out_row_stride, args.out_col_stride) &&
                      (w.data == nullptr || whole_chunks<T>(args, w.data, w.row_stride, w.col_stride));
  return vector ? launch<kind, true>(perturb_kernel<T, kind, true>, job_of<T>(args), gpu)
                : launch<kind, false>(perturb_kernel<T, kind, false>, job_of<T>(args), gpu);
}

template <class T>
gpu::Error run(const PerturbArgs& args, const Gpu& gpu) {
  switch (static_cast<Noise>(args.noise.kind)) {
    case Noise::kNone: return run_packed<T, Noise::kNone>(args, gpu);
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
