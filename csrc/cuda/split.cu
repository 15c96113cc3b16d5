#include "linear_job.h"
#include "split.h"

namespace flatlora {

gpu::Error add_parts(const LinearJob& job, const Gpu& gpu) {
  const int64_t blocks = (job.args.M * job.outputs + kSplitThreads - 1) / kSplitThreads, most = 16 * gpu.processors;
  gpu::Launch how = {};
  how.blocks = blocks < most ? blocks : most;
  how.threads = kSplitThreads;
  how.stream = gpu.stream;
  how.cluster = 1;
  switch (DType(job.args.dtype)) {
    case DType::kBFloat16: return gpu::launch(add_parts_kernel<gpu::bf16>, how, job);
    case DType::kFloat16: return gpu::launch(add_parts_kernel<gpu::f16>, how, job);
    default: return gpu::launch(add_parts_kernel<float>, how, job);
  }
}

}  // namespace flatlora
