// How the host starts a kernel; with FLATLORA_EMULATED, ../emulator/launch.h has the same.
#pragma once

#include "device.h"

#if defined(FLATLORA_EMULATED)
#include "../emulator/launch.h"
#else

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <map>
#include <utility>

namespace flatlora {
namespace gpu {

using Error = int;  // cudaError_t, 0 = success; or this and a CUresult of cuTensorMapEncodeTiled
constexpr Error kTensorMapError = 100000;

struct Launch {
  int64_t blocks;
  int threads;
  int shared_bytes;  // dynamic; shared_base's alignment is added here
  void* stream;
  // Blocks that share; divides `blocks`.
  int cluster = 1;
  bool together = false;  // all blocks at once, or an error
};

struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};

  LaunchConfig(const LaunchConfig&) = delete;
  explicit LaunchConfig(const Launch& how) {
    config.gridDim = dim3(unsigned(how.blocks));
    config.blockDim = dim3(unsigned(how.threads));
    config.dynamicSmemBytes = size_t(how.shared_bytes + 1024);
    config.stream = static_cast<cudaStream_t>(how.stream);
    config.attrs = attributes;
    if (how.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = unsigned(how.cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (how.together) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }
};

template <class... P>
Error allow_shared(void (*kernel)(P...), const Launch& how) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              how.shared_bytes + 1024);
}

// Clusters that run at once: fewer than the processors would give where a group of these has a remainder.
template <class... P>
Error clusters_at_once(void (*kernel)(P...), const Launch& how, int64_t processors, int64_t* count) {
  if (how.cluster == 1) {  // blocks with nothing to share: not what cudaOccupancyMaxActiveClusters counts
    *count = processors;
    return cudaSuccess;
  }
  static thread_local std::map<std::pair<void (*)(P...), int>, int> known;
  int device;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  int& found = known[{kernel, device}];
  if (found == 0) {
    if (const Error e = allow_shared(kernel, how)) return e;
    const LaunchConfig launch(how);
    if (const cudaError_t e =
            cudaOccupancyMaxActiveClusters(&found, reinterpret_cast<const void*>(kernel), &launch.config))
      return e;
  }
  *count = found;
  return cudaSuccess;
}

template <class... P>
Error launch(void (*kernel)(P...), const Launch& how, const P&... arguments) {
  // Each call, because it costs less than to remember it per device and kernel.
  if (const Error e = allow_shared(kernel, how)) return e;
  const LaunchConfig launch(how);
  return cudaLaunchKernelEx(&launch.config, kernel, P(arguments)...);
}

inline Error clear(void* data, int64_t bytes, void* stream) {
  return cudaMemsetAsync(data, 0, size_t(bytes), static_cast<cudaStream_t>(stream));
}

// Of row-major (rows, columns) matrices of 16-bit elements, one after the other, for boxes of (box_rows, 64) that lie
// with 128-byte rows under the 128-byte swizzle (16-byte chunk c of row r at chunk c ^ r % 8). `data` and `row_bytes`:
// multiples of 16.
inline Error encode_tensor_maps(TensorMap* map, const void* data, int planes, int64_t rows, int64_t columns,
                                int64_t row_bytes, int box_rows, bool is_bf16) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) ||
        found != cudaDriverEntryPointSuccess)
      function = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  if (encode == nullptr) return cudaErrorSymbolNotFound;
  const cuuint64_t sizes[3] = {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(planes)};
  const cuuint64_t strides[2] = {cuuint64_t(row_bytes), cuuint64_t(rows * row_bytes)};
  const cuuint32_t box[3] = {64, cuuint32_t(box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result =
      encode(map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, planes > 0 ? 3 : 2,
             const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : kTensorMapError + int(result);
}
// Of one, for instructions without planes.
inline Error encode_tensor_map(TensorMap* map, const void* data, int64_t rows, int64_t columns, int64_t row_bytes,
                               int box_rows, bool is_bf16) {
  return encode_tensor_maps(map, data, 0, rows, columns, row_bytes, box_rows, is_bf16);
}

}  // namespace gpu
}  // namespace flatlora

#endif
