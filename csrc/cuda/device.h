// What kernels are written in. Every instruction that C++ has no word for, and every access to shared or global
// memory, is a function of namespace `gpu` with two implementations: ptx.h, and with FLATLORA_EMULATED
// ../emulator/ptx.h, which runs the same kernels on the CPU and checks what hardware would punish.
#pragma once

#include <cstdint>

#include "../common/philox.h"

#if defined(FLATLORA_EMULATED)
#define FLATLORA_DEVICE inline
#define FLATLORA_UNROLL
#define FLATLORA_NO_UNROLL
#define FLATLORA_KERNEL(threads, blocks_per_processor) void
#define FLATLORA_GRID_CONSTANT
#else
#define FLATLORA_DEVICE __device__ __forceinline__
#define FLATLORA_UNROLL _Pragma("unroll")
#define FLATLORA_NO_UNROLL _Pragma("unroll 1")
#define FLATLORA_KERNEL(threads, blocks_per_processor) __global__ void __launch_bounds__(threads, blocks_per_processor)
#define FLATLORA_GRID_CONSTANT __grid_constant__
#endif

namespace flatlora {
namespace gpu {

// An address in the block's shared memory, in bytes.
using Shared = uint32_t;

// 32-bit words that one instruction moves.
template <int n>
struct alignas(4 * n) Words {
  uint32_t v[n];
};

// Storage types: bits only, conversions are instructions.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace gpu
}  // namespace flatlora

#if defined(FLATLORA_EMULATED)
#include "../emulator/ptx.h"
#else
#include "ptx.h"
#endif
