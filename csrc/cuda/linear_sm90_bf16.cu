#include "linear_sm90.h"

namespace flatlora {
FLATLORA_LINEAR_SM90(gpu::bf16)
}
