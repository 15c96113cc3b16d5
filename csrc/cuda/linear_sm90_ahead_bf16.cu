#include "linear_sm90_ahead.h"

namespace flatlora {
FLATLORA_LINEAR_AHEAD(gpu::bf16)
}
