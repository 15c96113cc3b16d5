// A libcuda in which all calls succeed and nothing runs, so that launchers can be tested without a GPU. It keeps what it
// was last asked for, and refuses tensor maps that hardware would refuse.
#include <stdint.h>
#include <string.h>

typedef int CUresult;

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned attribute_count;
} Config;

// Read by driver.py.
int64_t launches, grid[3], threads, shared, stream, values[10];
int64_t maps, box[5];
// Written by it.
int64_t architecture, processors, shared_limit;

CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 10: *value = 32; break;  // lanes of a warp
    case 16: *value = (int)processors; break;
    case 75: *value = (int)architecture / 10; break;
    case 76: *value = (int)architecture % 10; break;
    case 81: *value = (int)shared_limit + 1024; break;  // of a processor
    case 82: *value = 65536; break;  // registers
    case 97: *value = (int)shared_limit; break;  // of a block that asks for it
    default: *value = 1024;
  }
  return 0;
}

CUresult cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  ++launches;
  for (int i = 0; i < 3; ++i) grid[i] = config->grid[i];
  threads = config->block[0];
  shared = config->shared;
  stream = (int64_t)config->stream;
  for (int i = 0; i < 10; ++i) memcpy(&values[i], parameters[i], 8);
  return shared > shared_limit || threads > 1024;
}

CUresult cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *address, const uint64_t *sizes,
                                const uint64_t *strides, const unsigned *boxes, const unsigned *steps, int interleave,
                                int swizzle, int promotion, int fill) {
  ++maps;
  memset(map, 0, 128);
  for (unsigned i = 0; i < rank; ++i) {
    box[i] = boxes[i];
    if (boxes[i] == 0 || boxes[i] > 256 || sizes[i] == 0 || sizes[i] > 1ull << 32 || steps[i] != 1) return 1;
    if (i && (strides[i - 1] % 16 || strides[i - 1] >= 1ull << 40)) return 1;
  }
  return (uint64_t)address % 16 != 0;
}

CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "refused", 0; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, 0; }
CUresult cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, 0; }
CUresult cuCtxGetCurrent(void **context) { return *context = (void *)1, 0; }
CUresult cuCtxSetCurrent(void *context) { return 0; }
CUresult cuCtxGetDevice(int *device) { return *device = 0, 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
CUresult cuCtxGetLimit(size_t *value, int limit) { return *value = 0, 0; }
CUresult cuModuleLoadData(void **module, const void *image) { return *module = (void *)1, 0; }
CUresult cuModuleUnload(void *module) { return 0; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { return *function = (void *)1, 0; }
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) { return *value = attribute ? 0 : 1024, 0; }
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return 0; }
CUresult cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) { return *(uint64_t *)value = pointer, 0; }
CUresult cuStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }
