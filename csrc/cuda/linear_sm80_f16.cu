#include "linear_sm80.h"

namespace flatlora {
FLATLORA_LINEAR_SM80(gpu::f16)
}
