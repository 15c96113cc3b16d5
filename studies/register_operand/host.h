// Host side of a study library: launch(kind, ...), info(what). 16-bit row-major operands, contiguous.
#include <cstdio>
static PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto encode = [] {
    void* f = nullptr; cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found) || found != cudaDriverEntryPointSuccess) f = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(f);
  }();
  return encode;
}
static int make_map(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows, int box_columns) {
  if (!data) return 0;
  if (!encoder()) return cudaErrorSymbolNotFound;
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(columns * 2)};
  const cuuint32_t box[2] = {cuuint32_t(box_columns), cuuint32_t(box_rows)}, steps[2] = {1, 1};
  return encoder()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS ? 0 : 10001;
}
#define CASE(k) k,
static const int kKinds[] = {CASES};
#undef CASE
extern "C" __attribute__((visibility("default"))) int info(int what) {
  switch (what) { case 0: return kBatch; case 1: return kWG; case 2: return STAGES; case 3: return SHARED; case 4: return SPLIT; case 5: return MC; case 6: return EPI; case 7: return BWD; case 8: return int(sizeof(kKinds) / sizeof(int)); }
  return what >= 100 ? kKinds[what - 100] : -1;
}
#ifndef RS2
template <int K> static int start(const Maps& maps, const Job& job, int blocks, cudaStream_t s) {
  if (int e = cudaFuncSetAttribute(reinterpret_cast<const void*>(rs<K>), cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) return e;
  constexpr int cluster = kSplit * kMC;
  int sms = 0, dev = 0; cudaGetDevice(&dev); cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, dev);
  cudaLaunchConfig_t c = {}; cudaLaunchAttribute at = {};
  c.blockDim = dim3(128 * (kWG + 1)); c.dynamicSmemBytes = kShared; c.stream = s;
  if (cluster > 1) { at.id = cudaLaunchAttributeClusterDimension; at.val.clusterDim.x = cluster; at.val.clusterDim.y = at.val.clusterDim.z = 1; c.attrs = &at; c.numAttrs = 1; }
  int grid = kSplit > 1 ? job.tiles * kSplit : job.tiles;
  if (kSplit == 1) { const int most = blocks > 0 ? blocks : sms; if (grid > most) grid = most; grid = grid / cluster * cluster; }
  c.gridDim = dim3(grid);
  return cudaLaunchKernelEx(&c, rs<K>, maps, job);
}
// BWD 0: y[M, N] = x[M, K] W'[N, K]^T + scaling u[M, R] l[N, R]^T; BWD 1: y[M, N] = x[M, K] W'[K, N], noise rows along K.
extern "C" __attribute__((visibility("default"))) int launch(int kind, const void* w, const void* x, const void* l, const void* u, float scaling, int rank, const float* scale, void* y,
                      int N, int M, int K, uint64_t seed, uint32_t stream, uint32_t sample, int blocks, void* s) {
  if (N % (64 * kWG * kMC) || K % (128 * kSplit) || rank % 64 || (BWD && rank)) return 10002;
  Maps maps = {};
  int e = 0;
  if (BWD) e = make_map(&maps.w, w, K, N, 64, 64); else e = make_map(&maps.w, w, N, K, 64 * kWG, 64);
  if (!e) e = make_map(&maps.x, x, M, K, kBatch / kMC, 64);
  if (!e && rank) e = make_map(&maps.l, l, N, rank, 64 * kWG, 64);
  if (!e && rank) e = make_map(&maps.u, u, M, rank, kBatch / kMC, 64);
  if (!e) e = make_map(&maps.y, y, M, N, 32, 64);
  if (e) return e;
  Job job = {scaling, rank / 64, N / (64 * kWG) * ((M + kBatch - 1) / kBatch), scale, static_cast<__nv_bfloat16*>(y), N, M, K / 64, seed, stream, sample};
  switch (kind) {
#define CASE(k) case k: return start<k>(maps, job, blocks, static_cast<cudaStream_t>(s));
    CASES
  }
  return 10003;
}
#endif
