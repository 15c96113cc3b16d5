// Study: y = a P^T (or a P) with P = W + eps, in one persistent kernel. Two consumer warpgroups multiply 128 x 256 tiles; seven more
// warps draw W + eps of the whole weight, a step of the contraction after the other, into memory (L2) ahead of the products.
#include "../../csrc/cuda/noise.h"
#include <cudaTypedefs.h>
#include <cuda_runtime.h>
using namespace flatlora;
#define DEV __device__ __forceinline__
constexpr int kM = 128, kN = 256, kStages = 4, kABytes = kM * 128, kWBytes = kN * 128, kStage = kABytes + kWBytes;
constexpr int kOut = 8 * 2 * 2048, kShared = kStages * kStage + kOut + 256 + 1024;
constexpr int kUnits = 16;  // of 16 x 64 values, in a step of a tile
enum { kNone = 9 };

DEV void stmatrix(uint32_t p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(p), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
DEV void tma_store(const CUtensorMap* m, int c, int r, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(m), "r"(c), "r"(r), "r"(from) : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
DEV uint32_t load_acquire(const uint32_t* p) { uint32_t v; asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
DEV void add_release(uint32_t* p, uint32_t v) { asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
DEV void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

struct Maps { CUtensorMap a, w, u, l, y; };
struct Job {
  const char* w; char* out; const float* scale; uint32_t* flags; uint32_t* done;
  int N, K, tiles_m, tiles_n, steps, lora_steps, group_m, group_n;
  uint64_t seed; uint32_t stream, sample;
};

DEV Draw make_draw(const Job& j) {
  Draw d; d.key0 = uint32_t(j.seed); d.key1 = uint32_t(j.seed >> 32);
  uint32_t high, low; mulhilo(kPhiloxM1, j.stream, high, low);
  d.row_key = high ^ d.round_key0(0); d.block_key0 = j.sample ^ d.round_key1(0); d.block_key1 = low ^ d.round_key0(1);
  d.first_row = 0; d.first_block = 0; d.sign = 1.0f; d.flip = 0; return d;
}
DEV void tile_of(const Job& j, int index, int& m, int& n) {
  const int per = j.group_m * j.tiles_n, first = index / per * j.group_m, within = index % per;
  const int height = min(j.tiles_m - first, j.group_m);
  m = first + within % height; n = within / height;
}

#ifndef THREADS
#define THREADS 512
#endif
template <int kKind, bool kBack, int kDrawers>   // kDrawers: warps that draw
__global__ void __launch_bounds__(THREADS, 1) ahead(const __grid_constant__ Maps maps, const __grid_constant__ Job p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  const uint32_t base = (uint32_t(__cvta_generic_to_shared(raw)) + 1023u) & ~1023u;
  const uint32_t out = base + kStages * kStage, bars = out + kOut;
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  auto full = [&](int s) { return bars + 16 * s; };
  auto empty = [&](int s) { return bars + 16 * s + 8; };
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) { gpu::mbarrier_init(full(i), 1); gpu::mbarrier_init(empty(i), 8); }
    gpu::fence_mbarrier_init();
  }
  __syncthreads();
  const int tiles = p.tiles_m * p.tiles_n;
  if (warp >= 8) {
    if constexpr (THREADS == 512) gpu::registers_decrease<88>();
    if (warp == 8) {                       // the copy engine
      int slot = 0; uint32_t par = 0;
#pragma unroll 1
      for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        int m, n; tile_of(p, tile, m, n);
        int ready = kKind == kNone ? p.steps : 0;
#pragma unroll 1
        for (int t = 0; t < p.steps + p.lora_steps; ++t) {
          if (kKind != kNone && t == ready && t < p.steps) {
            uint32_t got;
            do {
              const bool yes = t + lane < p.steps && load_acquire(p.flags + n * p.steps + t + lane) >= kUnits;
              got = __ballot_sync(~0u, yes);
            } while (!(got & 1));
            ready = t + (got == ~0u ? 32 : __ffs(~got) - 1);
            fence_async_global();
            __syncwarp();
          }
          if (lane == 0) {
            gpu::mbarrier_wait(empty(slot), par ^ 1);
            const uint32_t to = base + slot * kStage;
            const bool lora = t >= p.steps;
            const int at = (lora ? t - p.steps : t) * 64;
            gpu::mbarrier_arrive_expect(full(slot), kStage);
            gpu::tma_load(to, lora ? &maps.u : &maps.a, at, m * kM, full(slot));
            const CUtensorMap* w = lora ? &maps.l : &maps.w;
            if constexpr (kBack) {
#pragma unroll
              for (int i = 0; i < 4; ++i) gpu::tma_load(to + kABytes + i * 8192, w, n * kN + i * 64, at, full(slot));
            } else {
              gpu::tma_load(to + kABytes, w, at, n * kN, full(slot));
            }
          }
          __syncwarp();
          if (++slot == kStages) slot = 0, par ^= 1;
        }
      }
      if constexpr (kKind != kNone) {      // the last block to come here leaves zeros
        uint32_t before = 0;
        if (lane == 0) asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(p.done) : "memory");
        before = __shfl_sync(~0u, before, 0);
        if (before + 1 == gridDim.x) {
          for (int i = lane; i < p.tiles_n * p.steps; i += 32) p.flags[i] = 0;
          if (lane == 0) *p.done = 0;
        }
      }
    } else if (kKind != kNone && warp - 9 < kDrawers) {
      constexpr Noise kNoise = Noise(kKind == kNone ? int(Noise::kGaussian) : kKind);
      using T = gpu::bf16;
      using Own = Patch<kNoise>;
      const Draw draw = make_draw(p);
      const int all = p.tiles_n * p.steps * kUnits, stride = kDrawers * gridDim.x;
      const int chunk = Own::kUnit ? lane % 4 * 2 : lane % 8, line = Own::kUnit ? lane / 4 : lane / 8 * 4;
      struct Place { int row, col, flag; };
      auto place = [&](int q) {
        const int per = p.group_n * p.steps * kUnits, g = q / per, r = q % per;
        const int wide = min(p.tiles_n - g * p.group_n, p.group_n), t = r / (wide * kUnits);
        const int tile = g * p.group_n + r % (wide * kUnits) / kUnits, unit = r % kUnits;
        Place at;
        at.row = kBack ? t * 64 + unit / 4 * 16 : tile * kN + unit * 16;
        at.col = kBack ? tile * kN + unit % 4 * 64 : t * 64;
        at.flag = tile * p.steps + t;
        return at;
      };
      auto offset = [&](const Place& at) { return (int64_t(at.row + line) * p.K + at.col + chunk * 8) * 2; };
      Chunk<T> next[4]; float scale[4]; Place ahead = {};
      auto load = [&](int q) {
        ahead = place(q);
        const char* from = p.w + offset(ahead);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          next[i] = gpu::load_global_once(from + int64_t(Own::row(i)) * p.K * 2 + Own::col(i) * 16);
          scale[i] = p.scale[ahead.row + line + Own::row(i)];
        }
      };
      int q = (warp - 9) * gridDim.x + blockIdx.x;
      if (q < all) load(q);
#pragma unroll 1
      for (; q < all; q += stride) {
        const Place at = ahead;
        Chunk<T> w[4]; PatchRows<kNoise, T> rows;
#pragma unroll
        for (int i = 0; i < 4; ++i) { w[i] = next[i]; rows.factor[i] = factor_of<kNoise, T>(draw, scale[i]); }
        if (q + stride < all) load(q + stride);
        set_rows(rows, draw, uint32_t(at.row + line));
        const PatchBlocks<kNoise> blocks = set_blocks<kNoise>(draw, uint32_t(at.col / 8 + chunk));
        perturb_patch<kNoise, T>(w, draw, rows, blocks);
        char* to = p.out + offset(at);
#pragma unroll
        for (int i = 0; i < 4; ++i) gpu::store_global(to + int64_t(Own::row(i)) * p.K * 2 + Own::col(i) * 16, w[i]);
        fence_async_global();
        __syncwarp();
        if (lane == 0) add_release(p.flags + at.flag, 1);
      }
    }
    return;
  }
  if constexpr (THREADS == 512) gpu::registers_increase<168>();
  const int g = warp / 4;
  auto describe = [&](uint32_t at, uint32_t box) { return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(box >> 4) << 16 | (at & 0x3ffff) >> 4; };
  const uint64_t da = describe(base + g * 8192, 16), dw = describe(base + kABytes, kBack ? 8192 : 16);
  float acc[2][64];
  int slot = 0; uint32_t par = 0;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    int m, n; tile_of(p, tile, m, n);
#pragma unroll
    for (int i = 0; i < 128; ++i) acc[i / 64][i % 64] = 0.0f;
    int before = slot;
#pragma unroll 1
    for (int t = 0; t < p.steps + p.lora_steps; ++t) {
      gpu::mbarrier_wait(full(slot), par);
      gpu::wgmma_hold(acc[0]); gpu::wgmma_hold(acc[1]);
      gpu::wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          gpu::wgmma<kBack>(acc[h], da + uint64_t(slot * (kStage >> 4) + j * 2), dw + uint64_t(slot * (kStage >> 4) + h * (16384 >> 4) + (kBack ? j * 128 : j * 2)), 1, gpu::bf16{});
      gpu::wgmma_commit();
      gpu::wgmma_wait<1>();
      gpu::wgmma_hold(acc[0]); gpu::wgmma_hold(acc[1]);
      if (t > 0 && lane == 0) gpu::mbarrier_arrive(empty(before));
      before = slot;
      if (++slot == kStages) slot = 0, par ^= 1;
    }
    gpu::wgmma_wait<0>();
    gpu::wgmma_hold(acc[0]); gpu::wgmma_hold(acc[1]);
    if (lane == 0) gpu::mbarrier_arrive(empty(before));
    // 16 rows x 64 columns at a time
    const uint32_t mine = out + warp * 4096, r = lane & 15, c = lane >> 4;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const uint32_t buf = mine + b % 2 * 2048;
      if (lane == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
      __syncwarp();
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        const int j = b * 32 + h * 8;   // acc of columns b * 64 + h * 16 + {0..7}, and + 8
        const float* v = acc[b / 2] + j % 64;
        stmatrix(buf + r * 128 + (((2 * h + c) ^ (r & 7)) << 4), gpu::pack_bf16(v[0], v[1]), gpu::pack_bf16(v[2], v[3]),
                 gpu::pack_bf16(v[4], v[5]), gpu::pack_bf16(v[6], v[7]));
      }
      gpu::fence_proxy_async();
      __syncwarp();
      if (lane == 0) tma_store(&maps.y, n * kN + b * 64, m * kM + warp * 16, buf);
    }
  }
  if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

static int make_map(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows) {
  if (!data) return 0;
  static const auto encode = [] {
    void* f = nullptr; cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(f);
  }();
  if (!encode) return 10000;
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(columns * 2)};
  const cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, steps[2] = {1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS ? 0 : 10001;
}
template <int kKind, bool kBack, int kDrawers> static int start(const Maps& maps, const Job& job, int blocks, void* s) {
  const auto kernel = ahead<kKind, kBack, kDrawers>;
  if (int e = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) return e;
  int sms = 0, dev = 0; cudaGetDevice(&dev); cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, dev);
  cudaLaunchConfig_t c = {}; cudaLaunchAttribute at = {};
  c.blockDim = dim3(THREADS); c.dynamicSmemBytes = kShared; c.stream = static_cast<cudaStream_t>(s);
  at.id = cudaLaunchAttributeCooperative; at.val.cooperative = 1; c.attrs = &at; c.numAttrs = kKind == kNone ? 0 : 1;
  c.gridDim = dim3(blocks > 0 ? blocks : sms);
  return cudaLaunchKernelEx(&c, kernel, maps, job);
}
// back 0: y[M, N] = a[M, K] P[N, K]^T + u[M, R] l[N, R]^T; 1: y[M, K] = a[M, N] P[N, K] + u[M, R] l[R, K].
extern "C" __attribute__((visibility("default"))) int launch(int kind, int back, int drawers, const void* w, const void* a, const void* l, const void* u, int rank, const float* scale, void* y, void* work,
    void* flags, int N, int M, int K, uint64_t seed, uint32_t stream, uint32_t sample, int group_m, int blocks, void* s) {
  const int outs = back ? K : N, len = back ? N : K;
  if (outs % 256 || len % 64 || K % 64 || N % 16) return 10002;
  Maps maps = {};
  const void* from = kind == kNone ? w : work;
  int e = make_map(&maps.a, a, M, len, kM);
  if (!e) e = make_map(&maps.w, from, N, K, back ? 64 : 256);
  if (!e && rank) e = make_map(&maps.u, u, M, rank, kM);
  if (!e && rank) e = back ? make_map(&maps.l, l, rank, K, 64) : make_map(&maps.l, l, N, rank, 256);
  if (!e) e = make_map(&maps.y, y, M, outs, 16);
  if (e) return e;
  int sms = 0, dev = 0; cudaGetDevice(&dev); cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, dev);
  if (blocks > 0) sms = blocks;
  Job job = {};
  job.w = static_cast<const char*>(w); job.out = static_cast<char*>(work); job.scale = scale; job.flags = static_cast<uint32_t*>(flags) + 32; job.done = static_cast<uint32_t*>(flags);
  job.N = N; job.K = K; job.tiles_m = (M + kM - 1) / kM; job.tiles_n = outs / kN; job.steps = len / 64; job.lora_steps = rank ? (rank + 63) / 64 : 0;
  job.group_m = group_m > 0 && group_m < job.tiles_m ? group_m : job.tiles_m;
  job.group_n = (sms + job.group_m - 1) / job.group_m; if (job.group_n > job.tiles_n) job.group_n = job.tiles_n;
  job.seed = seed; job.stream = stream; job.sample = sample;
#define CASE(k, b, d) if (kind == k && back == b && drawers == d) return start<k, b, d>(maps, job, blocks, s);
  CASES
  return 10003;
}
