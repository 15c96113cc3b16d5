#include "linear_sm90.h"

namespace flatlora {
FLATLORA_LINEAR_SM90(gpu::bf16)

gpu::Error clusters_sm90(int config, const gpu::Launch& how, int64_t processors, int64_t* count) {
  return clusters_sm90_config<gpu::bf16>(config, how, processors, count);
}
}  // namespace flatlora
