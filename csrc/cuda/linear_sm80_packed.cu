// The kernels of linear_sm80.h for a packed W, in bfloat16: which of the others a call would take, but for few rows.
#include "linear_sm80.h"

namespace flatlora {
namespace {

using T = gpu::bf16;

// Beside the stages: what a block can have, see configs.h.
static_assert(kTiles[kMiddle].shared_bytes(2) + kPackedTable + 1024 <= 99 << 10);
static_assert(kTiles[kLarge].shared_bytes(2) + kPackedTable + 1024 <= 163 << 10);
static_assert(kTiles[kAny].shared_bytes(2) + kTiles[kAny].rest_bytes(2) + kPackedTable + 1024 <= 99 << 10);

template <bool kInputGrad, Noise kNoise, int kBits>
gpu::Error launch_config(Config config, const gpu::Launch& how, const PackedLinearJob& job) {
  if (job.args.split_noise)
    return gpu::launch(linear_packed_sm80_kernel<T, kInputGrad, kNoise, kAny, true, kBits>, how, job);
  if (config == kLarge)
    return gpu::launch(linear_packed_sm80_kernel<T, kInputGrad, kNoise, kLarge, false, kBits>, how, job);
  if (config == kMiddle)
    return gpu::launch(linear_packed_sm80_kernel<T, kInputGrad, kNoise, kMiddle, false, kBits>, how, job);
  return gpu::launch(linear_packed_sm80_kernel<T, kInputGrad, kNoise, kAny, false, kBits>, how, job);
}

template <bool kInputGrad, Noise kNoise>
gpu::Error launch_bits(Config config, const gpu::Launch& how, const PackedLinearJob& job) {
  return job.packed.bits == 4 ? launch_config<kInputGrad, kNoise, 4>(config, how, job)
                              : launch_config<kInputGrad, kNoise, 8>(config, how, job);
}

template <bool kInputGrad>
gpu::Error launch_noise(Config config, const gpu::Launch& how, const PackedLinearJob& job) {
  switch (static_cast<Noise>(job.args.noise.kind)) {
    case Noise::kGaussian: return launch_bits<kInputGrad, Noise::kGaussian>(config, how, job);
    case Noise::kNearGaussian: return launch_bits<kInputGrad, Noise::kNearGaussian>(config, how, job);
    default: return launch_bits<kInputGrad, Noise::kRademacher>(config, how, job);
  }
}

}  // namespace

gpu::Error launch_linear_packed_sm80(Config config, const gpu::Launch& how, const PackedLinearJob& job) {
  return job.args.input_grad ? launch_noise<true>(config, how, job) : launch_noise<false>(config, how, job);
}

}  // namespace flatlora
