// The twin of ../cuda/launch.h.
#pragma once

#include "../cuda/device.h"

namespace flatlora {
namespace gpu {

// One launch at a time; it runs in the caller's thread and is over when this returns.
template <class... P>
Error launch(void (*kernel)(P...), const Launch& how, const P&... arguments) {
  return emulated::run(how, [&] { kernel(P(arguments)...); });
}

template <class... P>
Error clusters_at_once(void (*)(P...), const Launch& how, int64_t processors, int64_t* count) {
  *count = processors / how.cluster;
  return 0;
}

inline Error clear(void* data, int64_t bytes, void*) {
  memset(data, 0, size_t(bytes));
  return 0;
}

void emulated_device(int64_t* architecture, int64_t* processors, int64_t* shared_limit);
// What was wrong in the last launch.
const char* error_text(Error error);

// Once anything is allowed, nothing else may be touched in global memory.
void allow_memory(const void* p, int64_t bytes, bool write);
void forget_memory();

}  // namespace gpu
}  // namespace flatlora
