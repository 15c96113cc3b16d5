#include <cuda_runtime.h>
extern "C" __global__ void __launch_bounds__(512, 1) probe_kernel(int* p) { extern __shared__ int s[]; s[threadIdx.x] = *p; __syncthreads(); if (s[0] == 12345) *p = s[1]; }
extern "C" int probe_clusters(int cluster, int bytes, int threads, int* count) {
  cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchConfig_t c = {}; c.gridDim = dim3(cluster); c.blockDim = dim3(threads); c.dynamicSmemBytes = bytes;
  cudaLaunchAttribute a = {}; a.id = cudaLaunchAttributeClusterDimension; a.val.clusterDim.x = cluster; a.val.clusterDim.y = a.val.clusterDim.z = 1;
  c.attrs = &a; c.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(count, (const void*)probe_kernel, &c);
}
