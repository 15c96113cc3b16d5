// What api.cu may call: each kernel's launcher, by the file that has it.
#pragma once

#include "../common/args.h"
#include "launch.h"

namespace flatlora {

// Where a call runs: packed by flatlora_kernels/backends/cuda.py, except what api.cu knows of the device.
struct Gpu {
  int64_t device;
  void* stream;
  void* workspace;  // 16-byte aligned, or null
  int64_t workspace_bytes;
  int64_t tf32;  // float32 products: 1 = tf32, 0 = as exact as float32 (3xTF32)
  int64_t config, splits;  // for tests and tuning: row of the configuration table and parts of the sum; -1, 0 = choose
  int64_t architecture, processors, shared_limit;  // 80, 90, ...; api.cu
};

// Fused product for sm_80 and later; linear_sm80.h. Not of every packed W.
bool linear_sm80_takes(const LinearArgs&);
int64_t linear_sm80_workspace(const LinearArgs&, const Gpu&);  // bytes
gpu::Error linear_sm80(const LinearArgs&, const Gpu&);

// For sm_90a, where rows of x and W can be copied in 16 bytes; linear_sm90.h.
bool linear_sm90_takes(const LinearArgs&, const Gpu&);
int64_t linear_sm90_workspace(const LinearArgs&, const Gpu&);
gpu::Error linear_sm90(const LinearArgs&, const Gpu&);

// For sm_90a and many rows; linear_sm90_ahead.h.
bool linear_ahead_takes(const LinearArgs&, const Gpu&);
int64_t linear_ahead_workspace(const LinearArgs&, const Gpu&);
gpu::Error linear_ahead(const LinearArgs&, const Gpu&);

gpu::Error row_sq_norms(const RowNormsArgs&, const Gpu&);  // row_norms.h
gpu::Error transform(const TransformArgs&, const Gpu&);  // transform.h
gpu::Error perturb(const PerturbArgs&, const Gpu&);  // perturb.h

}  // namespace flatlora
