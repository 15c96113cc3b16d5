// Study: y = a P^T (or a P) with P = W + eps, in one persistent kernel. Two consumer warpgroups multiply 128 x 256 tiles; seven more
// warps draw W + eps of the whole weight, a step of the contraction after the other, into memory (L2) ahead of the products.
#include "../../csrc/cuda/noise.h"
#include <cudaTypedefs.h>
#include <cuda_runtime.h>
using namespace flatlora;
#define DEV __device__ __forceinline__
#ifndef KN
#define KN 256
#endif
#ifndef SPLIT
#define SPLIT 1
#endif
#ifndef SIGNAL
#define SIGNAL 1   // a warp of its own tells that units are done
#endif
#ifndef PREFETCH
#define PREFETCH 3   // units ahead into L2
#endif
#ifndef WHAT
#define WHAT 0   // 1: only copies, 2: touches no memory
#endif
#ifndef MC
#define MC 1   // 2: neighbours along m share a tile of W + eps
#endif
constexpr int kM = 128, kN = KN, kSplit = SPLIT, kStages = KN == 256 ? 4 : SPLIT == 2 ? 5 : 6, kABytes = kM * 128, kWBytes = kN * 128, kStage = kABytes + kWBytes;
constexpr int kOut = 8 * 2 * 2048, kOther = SPLIT == 2 ? 32768 : 0, kShared = kStages * kStage + kOut + kOther + 512 + 1024, kHalves = kN / 128;
constexpr int kUnits = kN / 16;  // of 16 x 64 values, in a step of a tile
enum { kNone = 9 };

DEV void stmatrix(uint32_t p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(p), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
DEV void tma_store(const CUtensorMap* m, int c, int r, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(m), "r"(c), "r"(r), "r"(from) : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
DEV uint32_t load_relaxed(const uint32_t* p) { uint32_t v; asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
DEV void add_release(uint32_t* p, uint32_t v) { asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
DEV void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

DEV void hold(float (&acc)[kHalves][64]) {
#pragma unroll
  for (int h = 0; h < kHalves; ++h) gpu::wgmma_hold(acc[h]);
}
struct Maps { CUtensorMap a, w, u, l, y; };
DEV uint64_t now() { uint64_t t; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)); return t; }
struct Job {
  unsigned long long* stamps;  // 256 of each block

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
  const int tiles_m = (j.tiles_m + MC - 1) / MC, group_m = (j.group_m + MC - 1) / MC;
  const int per = group_m * j.tiles_n, first = index / per * group_m, within = index % per;
  const int height = min(tiles_m - first, group_m);
  m = first + within % height; n = within / height;
}

#ifndef THREADS
#define THREADS 512
#endif
// Units in the order in which they are wanted: of the tiles of a wave, a step of the contraction after the other.
struct Walk {
  int tile0, wide, pos;
  DEV Walk(const Job& j, int first) : tile0(0), wide(min(j.tiles_n, j.group_n)), pos(first) { fold(j); }
  DEV void fold(const Job& j) {
    while (wide > 0 && pos >= wide * kUnits * j.steps) { pos -= wide * kUnits * j.steps; tile0 += wide; wide = min(j.tiles_n - tile0, j.group_n); }
  }
  DEV bool inside(const Job&) const { return wide > 0; }
  DEV void advance(const Job& j, int stride) { pos += stride; fold(j); }
  DEV void get(const Job& j, int& tile, int& t, int& unit) const {
    const uint32_t per = uint32_t(wide * kUnits), k = uint32_t(pos) / per, r = uint32_t(pos) - k * per;
    tile = tile0 + int(r / kUnits); unit = int(r % kUnits);
    t = kSplit == 1 ? int(k) : int(k % kSplit) * (j.steps / kSplit) + int(k / kSplit);
  }
};

template <int kKind, bool kBack, int kDrawers>   // kDrawers: warps that draw
__global__ void __launch_bounds__(THREADS, 1) ahead(const __grid_constant__ Maps maps, const __grid_constant__ Job p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  const uint32_t base = (uint32_t(__cvta_generic_to_shared(raw)) + 1023u) & ~1023u;
  const uint32_t out = base + kStages * kStage, other = out + kOut, bars = other + kOther, progress = bars + 160, drawn = bars + 256, got = bars + 128, space = bars + 136;
  const int crank = kSplit * MC > 1 ? int(gpu::cluster_rank()) : 0, rank = kSplit > 1 ? crank : 0, mrank = MC > 1 ? crank : 0, cluster = blockIdx.x / (kSplit * MC), clusters = gridDim.x / (kSplit * MC);
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  auto full = [&](int s) { return bars + 16 * s; };
  auto empty = [&](int s) { return bars + 16 * s + 8; };
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) { gpu::mbarrier_init(full(i), 1); gpu::mbarrier_init(empty(i), 8 * MC); }
    for (int i = 0; i < 28; ++i) gpu::mbarrier_init(drawn + 8 * i, 1);
    gpu::mbarrier_init(got, 1); gpu::mbarrier_init(space, 8);
    for (int i = 0; i < 8; ++i) asm volatile("st.shared.u32 [%0], 0;" ::"r"(progress + 4 * i) : "memory");
    gpu::fence_mbarrier_init();
  }
  if constexpr (kSplit * MC > 1) gpu::cluster_sync(); else __syncthreads();
  const int own_steps = p.steps / kSplit, first_step = rank * own_steps, lora_steps = rank == 0 ? p.lora_steps : 0;
  const int tiles = (p.tiles_m + MC - 1) / MC * p.tiles_n;
  if (warp >= 8) {
    if constexpr (THREADS == 512) gpu::registers_decrease<88>();
    if (warp == 8) {                       // the copy engine
      int slot = 0; uint32_t par = 0;
#pragma unroll 1
      for (int tile = cluster; tile < tiles; tile += clusters) {
        int m, n; tile_of(p, tile, m, n); m = m * MC + mrank;
        int ready = kKind == kNone ? own_steps : 0;
#pragma unroll 1
        for (int t = 0; t < own_steps + lora_steps; ++t) {
          if (kKind != kNone && t == ready && t < own_steps) {
            uint32_t got;
            do {
              const bool yes = t + lane < own_steps && load_relaxed(p.flags + n * p.steps + first_step + t + lane) >= kUnits;
              got = __ballot_sync(~0u, yes);
            } while (!(got & 1));
            ready = t + (got == ~0u ? 32 : __ffs(~got) - 1);
            asm volatile("fence.acq_rel.gpu;" ::: "memory");
            fence_async_global();
            __syncwarp();
          }
          if (lane == 0) {
            gpu::mbarrier_wait(empty(slot), par ^ 1);
            const uint32_t to = base + slot * kStage;
            const bool lora = t >= own_steps;
            const int at = (lora ? t - own_steps : first_step + t) * 64;
            gpu::mbarrier_arrive_expect(full(slot), kStage);
            gpu::tma_load(to, lora ? &maps.u : &maps.a, at, m * kM, full(slot));
            const CUtensorMap* w = lora ? &maps.l : &maps.w;
            if constexpr (kBack) {
#pragma unroll
              for (int i = mrank * (kN / 64 / MC); i < (mrank + 1) * (kN / 64 / MC); ++i) {
                if constexpr (MC > 1) gpu::tma_load_multicast(to + kABytes + i * 8192, w, n * kN + i * 64, at, full(slot), (1 << MC) - 1);
                else gpu::tma_load(to + kABytes + i * 8192, w, n * kN + i * 64, at, full(slot));
              }
            } else {
              if constexpr (MC > 1) gpu::tma_load_multicast(to + kABytes + mrank * (kWBytes / MC), w, at, n * kN + mrank * (kN / MC), full(slot), (1 << MC) - 1);
              else gpu::tma_load(to + kABytes, w, at, n * kN, full(slot));
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
    } else if (kKind != kNone && warp - 9 < kDrawers + (SIGNAL ? 1 : 0)) {
      constexpr Noise kNoise = Noise(kKind == kNone ? int(Noise::kGaussian) : kKind);
      using T = gpu::bf16;
      using Own = Patch<kNoise>;
      const Draw draw = make_draw(p);
      const int stride = kDrawers * gridDim.x, me = warp - 9;
      const int chunk = Own::kUnit ? lane % 4 * 2 : lane % 8, line = Own::kUnit ? lane / 4 : lane / 8 * 4;
      struct Place { int row, col, flag; };
      Walk walk(p, me < kDrawers ? me * gridDim.x + blockIdx.x : lane * gridDim.x + blockIdx.x);
      auto place_of = [&](const Walk& walk) {
        int tile, t, unit; walk.get(p, tile, t, unit);
        Place at;
        at.row = kBack ? t * 64 + unit % 4 * 16 : tile * kN + unit * 16;
        at.col = kBack ? tile * kN + unit / 4 * 64 : t * 64;
        at.flag = tile * p.steps + t;
        return at;
      };
      auto place = [&]() { return place_of(walk); };
      Walk far = walk;
      auto fetch = [&]() {
        if (PREFETCH > 0 && far.inside(p)) {
          const Place to = place_of(far);
          if (lane < 16) asm volatile("prefetch.global.L2 [%0];" ::"l"(p.w + (int64_t(to.row + lane) * p.K + to.col) * 2));
          far.advance(p, stride);
        }
      };
      for (int i = 0; i < PREFETCH; ++i) { if (i == 0 || me >= kDrawers) far.advance(p, stride); else fetch(); }
      if (me >= kDrawers) {                // tells of what the others have drawn; a lane for each of them
        uint32_t done = 0;
        bool more = lane < kDrawers && walk.inside(p);
        while (__any_sync(~0u, more)) {
          const bool yes = more && gpu::mbarrier_test(drawn + 32 * lane + done % 4 * 8, done / 4 % 2);
          if (!__any_sync(~0u, yes)) continue;
          fence_async_global();
          asm volatile("fence.acq_rel.gpu;" ::: "memory");
          if (yes) {
            asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(p.flags + place().flag) : "memory");
            ++done; walk.advance(p, stride); more = walk.inside(p);
            asm volatile("st.volatile.shared.u32 [%0], %1;" ::"r"(progress + 4 * lane), "r"(done) : "memory");
          }
        }
        return;
      }
      auto offset = [&](const Place& at) { return (int64_t(at.row + line) * p.K + at.col + chunk * 8) * 2; };
      Chunk<T> next[4]; float scale[4]; Place ahead = {};
      auto load = [&]() {
        ahead = place();
        fetch();
        const char* from = p.w + offset(ahead);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (WHAT == 2) { next[i] = Chunk<T>{{uint32_t(ahead.row), 0, 0, 0}}; scale[i] = 1e-9f; continue; }
          next[i] = gpu::load_global_once(from + int64_t(Own::row(i)) * p.K * 2 + Own::col(i) * 16);
          scale[i] = p.scale[ahead.row + line + Own::row(i)];
        }
      };
      if (walk.inside(p)) load();
      uint32_t done = 0; int before = 0, done_count = 0;
#pragma unroll 1
      while (walk.inside(p)) {
        const Place at = ahead;
        Chunk<T> w[4]; PatchRows<kNoise, T> rows;
#pragma unroll
        for (int i = 0; i < 4; ++i) { w[i] = next[i]; rows.factor[i] = factor_of<kNoise, T>(draw, scale[i]); }
        walk.advance(p, stride);
        if (!SIGNAL && done) { fence_async_global(); __syncwarp(); if (lane == 0) add_release(p.flags + before, 1); }
        before = at.flag;
#ifdef STAMP
        if (me == 0 && lane == 0 && done_count < 50) p.stamps[blockIdx.x * 256 + 201 + done_count] = now();
#endif
        ++done_count;
        if (walk.inside(p)) load();
        set_rows(rows, draw, uint32_t(at.row + line));
        const PatchBlocks<kNoise> blocks = set_blocks<kNoise>(draw, uint32_t(at.col / 8 + chunk));
        if constexpr (WHAT != 1) perturb_patch<kNoise, T>(w, draw, rows, blocks);
        char* to = p.out + offset(at);
#pragma unroll
        for (int i = 0; i < 4; ++i) if (WHAT != 2 || w[i].v[0] == 0x12345678u) gpu::store_global(to + int64_t(Own::row(i)) * p.K * 2 + Own::col(i) * 16, w[i]);
        if constexpr (SIGNAL) {
          uint32_t told;                   // at most a unit of each barrier is told of late: a parity knows no more
          do asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(told) : "r"(progress + 4 * me) : "memory"); while (told + 3 < done);
          __syncwarp();
          if (lane == 0) gpu::mbarrier_arrive(drawn + 32 * me + done % 4 * 8);
          ++done;
        } else {
          done = 1;
        }
      }
      if (!SIGNAL && done) { fence_async_global(); __syncwarp(); if (lane == 0) add_release(p.flags + before, 1); }
    }
    return;
  }
  if constexpr (THREADS == 512) gpu::registers_increase<168>();
  const int g = warp / 4;
  auto describe = [&](uint32_t at, uint32_t box) { return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(box >> 4) << 16 | (at & 0x3ffff) >> 4; };
  const uint64_t da = describe(base + g * 8192, 16), dw = describe(base + kABytes, kBack ? 8192 : 16);
  auto release = [&](int s) {
    if constexpr (MC > 1) { if (lane < MC) gpu::mbarrier_arrive_cluster(empty(s), lane); }
    else if (lane == 0) gpu::mbarrier_arrive(empty(s));
  };
  float acc[kHalves][64];
  int slot = 0; uint32_t par = 0, sum = 0; int ticks = 1;
#ifdef STAMP
  if (threadIdx.x == 0) p.stamps[blockIdx.x * 256] = now();
#endif
#pragma unroll 1
  for (int tile = cluster; tile < tiles; tile += clusters) {
    int m, n; tile_of(p, tile, m, n); m = m * MC + mrank;
#pragma unroll
    for (int i = 0; i < 64 * kHalves; ++i) acc[i / 64][i % 64] = 0.0f;
    int before = slot;
#pragma unroll 1
    for (int t = 0; t < own_steps + lora_steps; ++t) {
      gpu::mbarrier_wait(full(slot), par);
#ifdef STAMP
      if (threadIdx.x == 0 && ticks < 200) p.stamps[blockIdx.x * 256 + ticks++] = now();
#endif
      hold(acc);
      gpu::wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int h = 0; h < kHalves; ++h)
          gpu::wgmma<kBack>(acc[h], da + uint64_t(slot * (kStage >> 4) + j * 2), dw + uint64_t(slot * (kStage >> 4) + h * (16384 >> 4) + (kBack ? j * 128 : j * 2)), 1, gpu::bf16{});
      gpu::wgmma_commit();
      gpu::wgmma_wait<1>();
      hold(acc);
      if (t > 0) release(before);
      before = slot;
      if (++slot == kStages) slot = 0, par ^= 1;
    }
    gpu::wgmma_wait<0>();
    hold(acc);
    release(before);
    if constexpr (kSplit == 2) {           // each block keeps half of the columns; the other half goes to its neighbour
      static_assert(kSplit == 1 || kN == 128);
      if (threadIdx.x == 0) gpu::mbarrier_arrive_expect(got, kOther);
      gpu::mbarrier_wait(space, sum ^ 1);
      const uint32_t to = other + threadIdx.x * 16;
      float own[32];
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
        float v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) { v[e] = rank ? acc[0][i + e] : acc[0][32 + i + e]; own[i + e] = rank ? acc[0][32 + i + e] : acc[0][i + e]; }
        asm volatile("{\n.reg .b32 to, bar;\nmapa.shared::cluster.u32 to, %0, %6;\nmapa.shared::cluster.u32 bar, %1, %6;\n"
                     "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%2, %3, %4, %5}, [bar];\n}"
                     ::"r"(to + i / 4 * 4096), "r"(got), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(rank ^ 1) : "memory");
      }
      gpu::mbarrier_wait(got, sum);
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
        float v[4];
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(to + i / 4 * 4096) : "memory");
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[0][i + e] = own[i + e] + v[e];
      }
      __syncwarp();
      if (lane == 0) gpu::mbarrier_arrive_cluster(space, rank ^ 1);
      sum ^= 1;
    }
    // 16 rows x 64 columns at a time
    const uint32_t mine = out + warp * 4096, r = lane & 15, c = lane >> 4;
#pragma unroll
    for (int b = 0; b < kN / 64; ++b) {
      if (kSplit > 1 && b > 0) continue;
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
      if (lane == 0) tma_store(&maps.y, n * kN + (kSplit > 1 ? rank : b) * 64, m * kM + warp * 16, buf);
    }
  }
  if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  if constexpr (kSplit * MC > 1) { __syncwarp(); gpu::cluster_sync(); }
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
  cudaLaunchConfig_t c = {}; cudaLaunchAttribute at[2] = {};
  c.blockDim = dim3(THREADS); c.dynamicSmemBytes = kShared; c.stream = static_cast<cudaStream_t>(s);
  int n = 0;
  if (kKind != kNone && kSplit * MC == 1) { at[n].id = cudaLaunchAttributeCooperative; at[n++].val.cooperative = 1; }
  if (kSplit * MC > 1) { at[n].id = cudaLaunchAttributeClusterDimension; at[n].val.clusterDim.x = kSplit * MC; at[n].val.clusterDim.y = at[n].val.clusterDim.z = 1; ++n; }
  c.attrs = at; c.numAttrs = n;
  c.gridDim = dim3((blocks > 0 ? blocks : sms) / (kSplit * MC) * (kSplit * MC));
  return cudaLaunchKernelEx(&c, kernel, maps, job);
}
// back 0: y[M, N] = a[M, K] P[N, K]^T + u[M, R] l[N, R]^T; 1: y[M, K] = a[M, N] P[N, K] + u[M, R] l[R, K].
extern "C" __attribute__((visibility("default"))) int launch(int kind, int back, int drawers, void* stamps, const void* w, const void* a, const void* l, const void* u, int rank, const float* scale, void* y, void* work,
    void* flags, int N, int M, int K, uint64_t seed, uint32_t stream, uint32_t sample, int group_m, int blocks, void* s) {
  const int outs = back ? K : N, len = back ? N : K;
  if (outs % kN || (len / 64) % kSplit || len % 64 || K % 64 || N % 16) return 10002;
  Maps maps = {};
  const void* from = kind == kNone ? w : work;
  int e = make_map(&maps.a, a, M, len, kM);
  if (!e) e = make_map(&maps.w, from, N, K, back ? 64 : kN / MC);
  if (!e && rank) e = make_map(&maps.u, u, M, rank, kM);
  if (!e && rank) e = back ? make_map(&maps.l, l, rank, K, 64) : make_map(&maps.l, l, N, rank, kN / MC);
  if (!e) e = make_map(&maps.y, y, M, outs, 16);
  if (e) return e;
  int sms = 0, dev = 0; cudaGetDevice(&dev); cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, dev);
  if (blocks > 0) sms = blocks;
  Job job = {};
  job.w = static_cast<const char*>(w); job.out = static_cast<char*>(work); job.scale = scale; job.flags = static_cast<uint32_t*>(flags) + 32; job.done = static_cast<uint32_t*>(flags);
  job.N = N; job.K = K; job.tiles_m = (M + kM - 1) / kM; job.tiles_n = outs / kN; job.steps = len / 64; job.lora_steps = rank ? (rank + 63) / 64 : 0;
  job.group_m = group_m > 0 && group_m < job.tiles_m ? group_m : job.tiles_m;
  job.group_n = (sms / kSplit + job.group_m - 1) / job.group_m; if (job.group_n > job.tiles_n) job.group_n = job.tiles_n;
  if (group_m == -1) job.tiles_m = 0;   // draws alone
  job.stamps = static_cast<unsigned long long*>(stamps); job.seed = seed; job.stream = stream; job.sample = sample;
#define CASE(k, b, d) if (kind == k && back == b && drawers == d) return start<k, b, d>(maps, job, blocks, s);
  CASES
  return 10003;
}
