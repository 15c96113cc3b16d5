// What linear_sm80.h and linear_sm90.h share.
#pragma once

#include "linear_sm80.h"

namespace flatlora {

// Sums job.partial into y; split.h.
gpu::Error add_parts(const LinearJob& job, const Gpu& gpu);

}  // namespace flatlora
