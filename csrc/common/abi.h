// What a library says of how it is called; flatlora_kernels/backends/shared/library.py compares it before it calls.
#pragma once

#include <cstdio>

namespace flatlora {

// To be raised here and in library.py with any change of what the structs or the exported functions mean that leaves
// the sizes of the structs as they are.
constexpr int kAbiVersion = 3;

// The version, and the size of each struct: "3 288 144 168 160 256". Written while the library is loaded: a static of a
// function would need the C++ runtime for its guard.
template <class... Structs>
struct Abi {
  char text[160];
  Abi() {
    int end = std::snprintf(text, sizeof text, "%d", kAbiVersion);
    ((end += std::snprintf(text + end, sizeof text - size_t(end), " %d", int(sizeof(Structs)))), ...);
  }
};
template <class... Structs>
const Abi<Structs...> kAbi;

}  // namespace flatlora
