// The C interface that flatlora_kernels/backends/cuda.py binds: what is known of a device, and the choice of a kernel.
#include <atomic>
#include <cstdio>

#include "../common/abi.h"
#include "kernels.h"

#if defined(FLATLORA_EMULATED)
#include "../emulator/tensors.h"
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace flatlora {

#if !defined(FLATLORA_HAVE_SM90)  // a build for other GPUs
bool linear_sm90_takes(const LinearArgs&, const Gpu&) { return false; }
int64_t linear_sm90_workspace(const LinearArgs&, const Gpu&) { return 0; }
gpu::Error linear_sm90(const LinearArgs&, const Gpu&) { return -1; }
bool linear_ahead_takes(const LinearArgs&, const Gpu&) { return false; }
int64_t linear_ahead_workspace(const LinearArgs&, const Gpu&) { return 0; }
gpu::Error linear_ahead(const LinearArgs&, const Gpu&) { return -1; }
#endif

namespace {

struct Device {
  int64_t architecture, processors, shared_limit;
};

#if defined(FLATLORA_EMULATED)

gpu::Error find_device(int64_t, Device* device) {
  gpu::emulated_device(&device->architecture, &device->processors, &device->shared_limit);
  return 0;
}

gpu::Error enter(const Gpu&) { return 0; }

const char* error_text(int error) { return gpu::error_text(error); }

#else

struct Tensors {
  template <class Args>
  void allow(const Args&, const Gpu&) {}
};

gpu::Error ask_device(int index, Device* device) {
  const auto get = [index](cudaDeviceAttr which, int64_t* value) {
    int found = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&found, which, index);
    *value = found;
    return error;
  };
  int64_t major, minor;
  if (cudaError_t e = get(cudaDevAttrComputeCapabilityMajor, &major)) return e;
  if (cudaError_t e = get(cudaDevAttrComputeCapabilityMinor, &minor)) return e;
  device->architecture = 10 * major + minor;
  if (cudaError_t e = get(cudaDevAttrMultiProcessorCount, &device->processors)) return e;
  return get(cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_limit);
}

// Asked once for each device. Threads that ask at the same time write the same.
gpu::Error find_device(int64_t index, Device* device) {
  constexpr int64_t kMost = 64;
  static Device known[kMost];
  static std::atomic<bool> is_known[kMost];
  if (index >= 0 && index < kMost && is_known[index].load(std::memory_order_acquire)) {
    *device = known[index];
    return 0;
  }
  if (const gpu::Error e = ask_device(int(index), device)) return e;
  if (index < kMost && !is_known[index].load(std::memory_order_relaxed)) {
    known[index] = *device;
    is_known[index].store(true, std::memory_order_release);
  }
  return 0;
}

// Always, because it makes the device's context current: in a thread of autograd's that has none, the driver's
// cuTensorMapEncodeTiled may be the first call that needs one.
gpu::Error enter(const Gpu& gpu) { return cudaSetDevice(int(gpu.device)); }

const char* error_text(int error) {
  if (error >= gpu::kTensorMapError) {
    static thread_local char text[96];
    std::snprintf(text, sizeof text, "cuTensorMapEncodeTiled failed with CUresult %d", error - gpu::kTensorMapError);
    return text;
  }
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return "the library has no code for this GPU; build it again with TORCH_CUDA_ARCH_LIST naming its compute "
             "capability";
    case cudaErrorInsufficientDriver:
      return "the driver is older than the CUDA version that the library was built with; update it, or build with an "
             "older nvcc";
    case cudaErrorSymbolNotFound: return "the driver has no cuTensorMapEncodeTiled; version 525 or later is needed";
    default: return cudaGetErrorString(static_cast<cudaError_t>(error));
  }
}

#endif

gpu::Error complete(const Gpu& given, Gpu* gpu) {
  *gpu = given;
  Device device;
  if (const gpu::Error e = find_device(given.device, &device)) return e;
  gpu->architecture = device.architecture;
  gpu->processors = device.processors;
  gpu->shared_limit = device.shared_limit;
  return 0;
}

template <class Args, class Kernel>
gpu::Error call(const Args& args, const Gpu& given, Kernel kernel) {
  Gpu gpu;
  if (const gpu::Error error = complete(given, &gpu)) return error;
  if (const gpu::Error error = enter(gpu)) return error;
  Tensors tensors;
  tensors.allow(args, gpu);
  return kernel(args, gpu);
}

// hadamard's product is `transform`.
constexpr int kNotFused = 200000, kNotPacked = 200001, kNotAhead = 200002;
int refused(const LinearArgs& args) {
  if (static_cast<Noise>(args.noise.kind) == Noise::kHadamard) return kNotFused;
  return linear_sm80_takes(args) ? 0 : kNotPacked;
}

// A kernel of the fused product: two functions, and where its `config` begins.
struct Fused {
  int64_t first_config;
  int64_t (*workspace)(const LinearArgs&, const Gpu&);
  gpu::Error (*run)(const LinearArgs&, const Gpu&);
};
constexpr Fused kSm80 = {0, linear_sm80_workspace, linear_sm80};
constexpr Fused kSm90 = {1000, linear_sm90_workspace, linear_sm90};
constexpr Fused kAhead = {2000, linear_ahead_workspace, linear_ahead};

// The kernel that takes the call, with the row of its table in gpu->config. kAhead is not chosen by itself, because it
// has not been measured; null where it is asked for and does not take the call, and where no kernel makes u.
const Fused* choose_fused(const LinearArgs& args, Gpu* gpu) {
  const int64_t asked = gpu->config;
  const auto is_asked = [asked](const Fused& kernel) {
    return asked >= kernel.first_config && asked < kernel.first_config + 1000;
  };
  if (is_asked(kAhead)) {
    gpu->config -= kAhead.first_config;
    return gpu->architecture == 90 && linear_ahead_takes(args, *gpu) ? &kAhead : nullptr;
  }
  if (args.lora_A != nullptr) return nullptr;
  if (gpu->architecture == 90 && (asked < 0 || is_asked(kSm90))) {
    if (asked >= 0) gpu->config -= kSm90.first_config;
    if (linear_sm90_takes(args, *gpu)) return &kSm90;
  }
  if (!is_asked(kSm80)) gpu->config = -1;
  return &kSm80;
}

}  // namespace
}  // namespace flatlora

EXPORT const char* flatlora_cuda_abi() {
  return flatlora::kAbi<flatlora::LinearArgs, flatlora::RowNormsArgs, flatlora::PerturbArgs, flatlora::TransformArgs,
                       flatlora::PackedArgs, flatlora::Gpu>.text;
}

// compute capability (80, 90, ...), multiprocessors, bytes of shared memory that a block can have
EXPORT int32_t flatlora_cuda_device(int64_t index, int64_t* out) {
  flatlora::Device device;
  if (const int error = flatlora::find_device(index, &device)) return error;
  out[0] = device.architecture;
  out[1] = device.processors;
  out[2] = device.shared_limit;
  return 0;
}

// Of an error that one of the functions here returned.
EXPORT const char* flatlora_cuda_error(int32_t error) {
  switch (error) {
    case flatlora::kNotFused: return "the fused product has no noise of kind 'hadamard'";
    case flatlora::kNotAhead:
      return "configurations from 2000 on are of the kernel for sm_90a that draws into a ring; it takes bfloat16 and "
             "float16 whose rows can be copied in 16 bytes, and needs workspace for 8 steps";
    case flatlora::kNotPacked: return "the fused product does not take a weight that is packed like this";
    default: return flatlora::error_text(error);
  }
}

// Bytes, or minus an error.
EXPORT int64_t flatlora_cuda_linear_workspace(const flatlora::LinearArgs* args, const flatlora::Gpu* given) {
  if (const int error = flatlora::refused(*args)) return -int64_t(error);
  flatlora::Gpu gpu;
  if (const int error = flatlora::complete(*given, &gpu)) return -int64_t(error);
  if (const int error = flatlora::enter(gpu)) return -int64_t(error);
  const flatlora::Fused* kernel = flatlora::choose_fused(*args, &gpu);
  return kernel ? kernel->workspace(*args, gpu) : -int64_t(flatlora::kNotAhead);
}

// Whether the kernel that would be chosen makes u of args->lora_A.
EXPORT int32_t flatlora_cuda_makes_u(const flatlora::LinearArgs* args, const flatlora::Gpu* given) {
  flatlora::Gpu gpu;
  return !flatlora::refused(*args) && !flatlora::complete(*given, &gpu) && flatlora::choose_fused(*args, &gpu);
}

EXPORT int32_t flatlora_cuda_linear(const flatlora::LinearArgs* args, const flatlora::Gpu* gpu) {
  if (const int error = flatlora::refused(*args)) return error;
  return flatlora::call(*args, *gpu, [](const flatlora::LinearArgs& args, flatlora::Gpu& gpu) {
    const flatlora::Fused* kernel = flatlora::choose_fused(args, &gpu);
    return kernel ? kernel->run(args, gpu) : flatlora::kNotAhead;
  });
}

EXPORT int32_t flatlora_cuda_row_sq_norms(const flatlora::RowNormsArgs* args, const flatlora::Gpu* gpu) {
  return flatlora::call(*args, *gpu, flatlora::row_sq_norms);
}

EXPORT int32_t flatlora_cuda_perturb(const flatlora::PerturbArgs* args, const flatlora::Gpu* gpu) {
  return flatlora::call(*args, *gpu, flatlora::perturb);
}

EXPORT int32_t flatlora_cuda_transform(const flatlora::TransformArgs* args, const flatlora::Gpu* gpu) {
  return flatlora::call(*args, *gpu, flatlora::transform);
}
