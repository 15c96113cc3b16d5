// Two blocks of a cluster, neighbouring rows of x, share the draw of a tile: each draws half the columns of a step and
// sends the fragments to the other. From rs2.cu of the study; see NOTES.md.
#define RS2
#include "rs.cu"
#ifndef LATE
#define LATE 1       // 0: the other's half is waited for in draw(), as in the study; 1: only before it is multiplied
#endif
constexpr int kWBytes2 = kWG * 64 * 64, kStage2 = kWBytes2 + kXBytes, kXchg = 2 * 4 * kWG * 1024, kRest2 = kOut + kXchg + 128 + 64 * kWG + 1024;
constexpr int kStages2 = (227 * 1024 - kRest2) / kStage2 > 8 ? 8 : (227 * 1024 - kRest2) / kStage2, kShared2 = kStages2 * kStage2 + kRest2;
// Half of a step: fragments f[0], f[1], 4 chunks from `chunk`.
template <int K> DEV void noise_half(uint32_t (&a)[4][4], const Key& d, const Rows& rows, uint32_t chunk, int lane) {
  const uint32_t c = lane & 3;
  const BlockKey bk = block_key(d, chunk + c);
  if constexpr (K == R_GAUSS || K == R_GAUSS16) {
    uint32_t w[2][4]; philox<ROUNDS>(d, rows.key, bk, w);
    transpose4(w[0], c); transpose4(w[1], c);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        uint32_t& x = a[t / 2][i + 2 * (t % 2)];
        const float u = asf(__byte_perm(w[i][t], 0x4b00u, 0x5410u)), v = asf(__byte_perm(w[i][t], 0x4b00u, 0x5432u));
        const float U = fmaf(u, 0x1p-16f, -0x1.fffffep+6f), th = fmaf(v, 0x1.921fb6p-14f, -0x1.921fb6p+9f);
        const float R = sq(-lg2(U)) * rows.f[i];   // with kGauss
        if constexpr (K == R_GAUSS) x = packbf(fmaf(R, cs(th), asf(x << 16)), fmaf(R, sn(th), asf(x & 0xffff0000u)));
        else x = hadd2(x, packbf(R * cs(th), R * sn(th)));
      }
  } else if constexpr (K == R_E2CHUNK) {
    RowKey r1[1] = {rows.key[0]}; uint32_t o[1][4]; philox<ROUNDS>(d, r1, bk, o);
    transpose4(o[0], c);
#pragma unroll
    for (int t = 0; t < 4; t += 2) {
      uint32_t z[4]; e2m2_h4(o[0][t], o[0][t + 1], z);
      a[t / 2][0] = hfma2(z[0], rows.s2[0], a[t / 2][0]); a[t / 2][1] = hfma2(z[1], rows.s2[1], a[t / 2][1]);
      a[t / 2][2] = hfma2(z[2], rows.s2[0], a[t / 2][2]); a[t / 2][3] = hfma2(z[3], rows.s2[1], a[t / 2][3]);
    }
  }
}
template <int K>
__global__ void __launch_bounds__(128 * (kWG + 1), 1)
rs2(const __grid_constant__ Maps maps, const Job p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  const uint32_t base = (uint32_t(__cvta_generic_to_shared(raw)) + 1023u) & ~1023u;
  uint32_t rank; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const uint32_t out = base + kStages2 * kStage2, xchg = out + kOut, bars = xchg + kXchg, xbars = bars + 128;
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  auto full = [&](int s) { return bars + 16 * s; };
  auto empty = [&](int s) { return bars + 16 * s + 8; };
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages2; ++i) { mb_init(full(i), 1); mb_init(empty(i), 4 * kWG); }
    for (int i = 0; i < 8 * kWG; ++i) mb_init(xbars + 8 * i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  const int columns = p.N / (64 * kWG), steps = p.steps;   // tiles: pairs along the rows of x
  if (warp >= 4 * kWG) {
#ifdef CREGS_SET
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
#endif
    if (warp == 4 * kWG && lane == 0) {
      int slot = 0; uint32_t par = 0;
#pragma unroll 1
      for (int tile = blockIdx.x / 2; tile < p.tiles; tile += gridDim.x / 2) {
        const int n0 = tile % columns * 64 * kWG, m0 = (tile / columns * 2 + int(rank)) * kBatch;
#pragma unroll 1
        for (int t = 0; t < steps; ++t) {
          mb_wait(empty(slot), par ^ 1);
          mb_expect(full(slot), kStage2);
          tma(base + slot * kStage2, &maps.w, t * 64 + int(rank) * 32, n0, full(slot));
          tma(base + slot * kStage2 + kWBytes2, &maps.x, t * 64, m0, full(slot));
          if (++slot == kStages2) slot = 0, par ^= 1;
        }
      }
    }
    return;
  }
#ifdef CREGS_SET
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CREGS));
#endif
  const int g = warp / 4, row = warp % 4 * 16 + lane / 4;   // in the warpgroup's 64
  Key d = make_key(p.seed, p.stream, p.sample);
  d.k0 = __shfl_sync(~0u, d.k0, 0); d.k1 = __shfl_sync(~0u, d.k1, 0);
  // ldmatrix: matrices (rows 0-7, k 0-7), (rows 8-15, k 0-7), (rows 0-7, k 8-15), (rows 8-15, k 8-15)
  const uint32_t lrow = g * 64 + warp % 4 * 16 + (lane & 15), lchunk = lane >> 4;
  const uint32_t lbase = base + lrow * 64;
  const uint64_t desc0 = uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 16 | ((base + kWBytes2) & 0x3ffff) >> 4;
  float acc[kBatch / 2];
  Rows rows;
  uint32_t a[2][4][4];
  int slot = 0; uint32_t par = 0, turn = 0;   // turn: parity of the exchange
  // W tile of 128 rows x 32 columns, 64-byte lines with the 64-byte swizzle
  uint32_t loff[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) loff[j] = ((2 * j + lchunk) ^ (lrow >> 1 & 3)) << 4;
  const uint32_t mine = xchg + warp * 1024 + lane * 16, xbar = xbars + warp * 16;
  const uint32_t peer = mapa(mine, rank ^ 1), pbar = mapa(xbar, rank ^ 1);
  auto receive = [&](uint32_t (&f)[4][4], int h) {
    const uint32_t o = h * (4 * kWG * 1024);
    mb_wait(xbar + 8 * h, turn);
#pragma unroll
    for (int j = 0; j < 2; ++j)
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(f[2 + j][0]), "=r"(f[2 + j][1]), "=r"(f[2 + j][2]), "=r"(f[2 + j][3]) : "r"(mine + o + j * 512) : "memory");
  };
  auto draw = [&](uint32_t (&f)[4][4], int t, int s, int h) {   // W' of step t, in stage s: own columns in f[0], f[1]
#pragma unroll
    for (int j = 0; j < 2; ++j) ldsm(f[j], lbase + s * kStage2 + loff[j]);
    noise_half<K>(f, d, rows, t * 8 + rank * 4, lane);
    const uint32_t o = h * (4 * kWG * 1024);
    if (lane == 0) mb_expect(xbar + 8 * h, 1024);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 2; ++j)
      asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(peer + o + j * 512), "r"(f[j][0]), "r"(f[j][1]), "r"(f[j][2]), "r"(f[j][3]), "r"(pbar + 8 * h) : "memory");
    if (!LATE) receive(f, h);
  };
  auto multiply = [&](uint32_t (&f)[4][4], int s) {
    hold(acc);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    const uint64_t b = desc0 + uint64_t(s * (kStage2 >> 4));
#pragma unroll
    for (int j = 0; j < 4; ++j) wg<kBatch>(acc, f[j], (j < 2 ? b + j * 2 + rank * 4 : b + (j - 2) * 2 + (rank ^ 1) * 4));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  };
  auto pin = [&](uint32_t (&f)[4][4]) {    // keeps ptxas from giving the operands' registers away before the wait
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(f[j][i])::"memory");
  };
#pragma unroll 1
  for (int tile = blockIdx.x / 2; tile < p.tiles; tile += gridDim.x / 2) {
    const int n0 = tile % columns * 64 * kWG, m0 = (tile / columns * 2 + int(rank)) * kBatch;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = n0 + g * 64 + row + 8 * i;
      rows.f[i] = p.scale[n];
      rows.s2[i] = packbf(rows.f[i], rows.f[i]);
      if constexpr (K == R_GAUSS || K == R_GAUSS16) rows.f[i] *= kGauss;
      rows.key[i] = row_key(d, K == R_E2CHUNK ? (n >> 4) * 8 + (n & 7) : n);
    }
#pragma unroll
    for (int i = 0; i < kBatch / 2; ++i) acc[i] = 0.0f;
    mb_wait(full(slot), par);
    draw(a[0], 0, slot, 0);
    // steps is even
#pragma unroll 1
    for (int t = 0; t < steps; t += 2) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (LATE) receive(a[h], h);
        multiply(a[h], slot);
        int next = slot + 1; uint32_t npar = par;
        if (next == kStages2) next = 0, npar ^= 1;
        if (h == 1) turn ^= 1;
        if (t + h + 1 < steps) {
          mb_wait(full(next), npar);
          draw(a[h ^ 1], t + h + 1, next, h ^ 1);
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        hold(acc); pin(a[h]);
        if (lane == 0) mb_arrive(empty(slot));
        slot = next; par = npar;
      }
    }
    write_out<kBatch / 8>(acc, p.y, &maps.y, out, g, warp, lane, n0, m0, p.N, p.M);
  }
#if EPI == 1
  if (warp % 4 == 0 && lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  __syncwarp();
#endif
  cluster_sync();
}

#include "host.h"
template <int K> static int start(const Maps& maps, const Job& job, int blocks, cudaStream_t s) {
  if (int e = cudaFuncSetAttribute(reinterpret_cast<const void*>(rs2<K>), cudaFuncAttributeMaxDynamicSharedMemorySize, kShared2)) return e;
  int sms = 0, dev = 0; cudaGetDevice(&dev); cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, dev);
  cudaLaunchConfig_t c = {}; cudaLaunchAttribute at = {};
  c.blockDim = dim3(128 * (kWG + 1)); c.dynamicSmemBytes = kShared2; c.stream = s;
  at.id = cudaLaunchAttributeClusterDimension; at.val.clusterDim.x = 2; at.val.clusterDim.y = at.val.clusterDim.z = 1; c.attrs = &at; c.numAttrs = 1;
  const int most = (blocks > 0 ? blocks : sms) / 2;
  c.gridDim = dim3(2 * (job.tiles < most ? job.tiles : most));
  return cudaLaunchKernelEx(&c, rs2<K>, maps, job);
}
extern "C" __attribute__((visibility("default"))) int launch(int kind, const void* w, const void* x, const void* l, const void* u, float scaling, int rank, const float* scale, void* y,
                      int N, int M, int K, uint64_t seed, uint32_t stream, uint32_t sample, int blocks, void* s) {
  if (N % (64 * kWG) || K % 128 || rank) return 10002;
  Maps maps = {};
  int e = make_map(&maps.w, w, N, K, 64 * kWG, 32);
  if (!e) e = make_map(&maps.x, x, M, K, kBatch, 64);
  if (!e) e = make_map(&maps.y, y, M, N, 32, 64);
  if (e) return e;
  Job job = {scaling, 0, N / (64 * kWG) * ((M + 2 * kBatch - 1) / (2 * kBatch)), scale, static_cast<__nv_bfloat16*>(y), N, M, K / 64, seed, stream, sample};
  switch (kind) {
#define CASE(k) case k: return start<k>(maps, job, blocks, static_cast<cudaStream_t>(s));
    CASES
  }
  return 10003;
}
