// Sums of parts that blocks left in a workspace, in the order of the parts.
#pragma once

#include "linear_job.h"

namespace flatlora {

constexpr int kSplitThreads = 256;

template <class T>
FLATLORA_KERNEL(kSplitThreads, 2)
add_parts_kernel(const FLATLORA_GRID_CONSTANT LinearJob job) {
  const LinearArgs& args = job.args;
  const int64_t count = args.M * job.outputs;
  for (int64_t i = gpu::block() * kSplitThreads + gpu::thread(); i < count; i += gpu::blocks() * kSplitThreads) {
    float sum = gpu::load_global<float>(job.partial + i);
    for (int64_t part = 1; part < job.parts; ++part) sum += gpu::load_global<float>(job.partial + part * count + i);
    if (args.bias != nullptr) sum += float_at(args.bias, args.bias_dtype, i % job.outputs * args.bias_stride);
    if constexpr (sizeof(T) == 4) {
      gpu::store_global(static_cast<float*>(args.y) + i, sum);
    } else {
      gpu::store_global(static_cast<uint16_t*>(args.y) + i, uint16_t(pack(T{}, sum, 0.0f)));
    }
  }
}

}  // namespace flatlora
