// y[m, n] = sum_k x[m, k] W'[n, k] as y^T = W' x^T (BWD 0), dX[m, k] = sum_n dY[m, n] W'[n, k] as dX^T = W'^T dY^T (BWD 1).
// From rs4.cu and rs3.cu of the study; see NOTES.md.
#include "rs_common.cuh"
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

DEV uint32_t movm(uint32_t a) { uint32_t d; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a)); return d; }
DEV void tma_multicast(uint32_t to, const CUtensorMap* m, int c, int r, uint32_t bar, uint16_t mask) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(m), "r"(c), "r"(r), "r"(bar), "h"(mask) : "memory");
}
DEV void bulk(uint32_t to, const void* from, int n, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(n), "r"(bar) : "memory");
}
DEV uint32_t mapa(uint32_t p, uint32_t rank) { uint32_t d; asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(d) : "r"(p), "r"(rank)); return d; }
DEV void mb_arrive_remote(uint32_t b) { asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(b) : "memory"); }
DEV void cluster_sync() { asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEV float ldsf(uint32_t p) { float v; asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(p)); return v; }

// The gradient's noise: fragments as ldmatrix brings them, a[i][0] row 16i + r cols 2c, [1] row + 8, [2] cols + 8, [3] both;
// then transposed. `scales`: f32 of the step's 64 rows.
template <int K> DEV void noise_bwd(uint32_t (&a)[4][4], const Key& d, const BlockKey (&bk)[2], uint32_t n0, uint32_t scales, int lane, uint32_t scratch, bool first) {
  const uint32_t c = lane & 3, r = lane >> 2;
  if constexpr (K == R_E2CHUNK) {
    uint32_t w[2][4];
    RowKey r1[1] = {row_key(d, ((n0 >> 4) + c) * 8 + r)};    // the call of rows 16 c + r, + 8 of the step
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t o[1][4]; philox<ROUNDS>(d, r1, bk[h], o);
#pragma unroll
      for (int q = 0; q < 4; ++q) w[h][q] = o[0][q];
      transpose4(w[h], c);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t z[4]; e2m2_h4(w[0][i], w[1][i], z);
      const float f0 = ldsf(scales + i * 64 + r * 4), f1 = ldsf(scales + i * 64 + 32 + r * 4);
      const uint32_t s0 = packbf(f0, f0), s1 = packbf(f1, f1);
      a[i][0] = hfma2(z[0], s0, a[i][0]); a[i][1] = hfma2(z[1], s1, a[i][1]); a[i][2] = hfma2(z[2], s0, a[i][2]); a[i][3] = hfma2(z[3], s1, a[i][3]);
    }
  } else if constexpr (K == R_GAUSS) {      // v1: this lane calls rows 16 c + r and + 8, chunks 0 and 1 of the warp's 16 columns
    RowKey keys[2] = {row_key(d, n0 + 16 * c + r), row_key(d, n0 + 16 * c + r + 8)};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t w[2][4]; philox<ROUNDS>(d, keys, bk[h], w);
      transpose4(w[0], c); transpose4(w[1], c);
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          uint32_t& x = a[t][e + 2 * h];
          const float f = ldsf(scales + t * 64 + e * 32 + r * 4) * kGauss;
          const float u = asf(__byte_perm(w[e][t], 0x4b00u, 0x5410u)), v = asf(__byte_perm(w[e][t], 0x4b00u, 0x5432u));
          const float U = fmaf(u, 0x1p-16f, -0x1.fffffep+6f), th = fmaf(v, 0x1.921fb6p-14f, -0x1.921fb6p+9f);
          const float R = sq(-lg2(U)) * f;
          x = packbf(fmaf(R, cs(th), asf(x << 16)), fmaf(R, sn(th), asf(x & 0xffff0000u)));
        }
    }
  } else if constexpr (K == R_RADE) {       // v1: a lane draws 16 rows x a chunk: 16 groups of rows x 2 chunks every 4 steps
    if (n0 % 256 == 0 || first) {
      RowKey r1[1] = {row_key(d, (n0 >> 8) * 16 + (lane >> 1))};
      BlockKey b;
#pragma unroll
      for (int q = 0; q < 4; ++q) b.k[q] = lane & 1 ? bk[1].k[q] : bk[0].k[q];
      uint32_t o[1][4]; philox<ROUNDS>(d, r1, b, o);
      __syncwarp(); sts128(scratch + lane * 16, o[0][0], o[0][2], o[0][1], o[0][3]); __syncwarp();
    }
    const uint32_t at = scratch + (n0 >> 6) % 4 * 128 + (r >> 2) * 8;
    const uint32_t se = 7 - 2 * c, so = 6 - 2 * c, sel = 0x4000u + 0x1010u * (r & 3);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float f0 = ldsf(scales + i * 64 + r * 4), f1 = ldsf(scales + i * 64 + 32 + r * 4);
      const uint32_t s2[2] = {packbf(f0, f0), packbf(f1, f1)};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t w[2]; lds64(w[0], w[1], at + i * 32 + h * 16);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t sg = __byte_perm(w[e] << se, w[e] << so, sel);
          a[i][e + 2 * h] = hadd2(a[i][e + 2 * h], lop_and_xor(s2[e], sg, 0x80008000u));
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) { const uint32_t t = movm(a[i][1]); a[i][0] = movm(a[i][0]); a[i][1] = movm(a[i][2]); a[i][2] = t; a[i][3] = movm(a[i][3]); }
}

// v: the warp's 16 outputs (first n0 + g * 64 + warp % 4 * 16) x kJ * 8 rows from m0.
template <int kJ> DEV void write_out(const float (&v)[4 * kJ], __nv_bfloat16* y, const CUtensorMap* ymap, uint32_t out, int g, int warp, int lane, int n0, int m0, int N, int M) {
#if EPI == 0
#pragma unroll
  for (int j = 0; j < kJ; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int m = m0 + 8 * j + 2 * (lane & 3) + e, n = n0 + g * 64 + warp % 4 * 16 + lane / 4 + 8 * i;
        if (m < M && n < N) y[int64_t(m) * N + n] = __float2bfloat16(v[4 * j + 2 * i + e]);
      }
#else
  const bool leader = warp % 4 == 0 && lane == 0;
  const uint32_t mat = lane >> 3, mrow = (mat >> 1) * 8 + (lane & 7);
  const uint32_t to = out + g * 8192 + mrow * 128 + ((((warp % 4) * 2 + (mat & 1)) ^ (lane & 7)) << 4);
#pragma unroll
  for (int ch = 0; ch < kJ / 4; ++ch) {
    const uint32_t buf = ch % 2 * 4096;     // a call has an even number of chunks
    if (leader) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(1 + g) : "memory");
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const int j = ch * 4 + p * 2;
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + buf + p * 2048), "r"(packbf(v[4 * j], v[4 * j + 1])),
                   "r"(packbf(v[4 * j + 2], v[4 * j + 3])), "r"(packbf(v[4 * j + 4], v[4 * j + 5])), "r"(packbf(v[4 * j + 6], v[4 * j + 7])) : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(1 + g) : "memory");
    if (leader) {
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(ymap), "r"(n0 + g * 64), "r"(m0 + ch * 32), "r"(out + g * 8192 + buf) : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
#endif
}

struct Maps { CUtensorMap w, x, l, u, y; };
struct Job { float scaling; int lora_steps, tiles; const float* scale; __nv_bfloat16* y; int N, M, steps; uint64_t seed; uint32_t stream, sample; };

template <int K>
__global__ void __launch_bounds__(128 * (kWG + 1), 1)
rs(const __grid_constant__ Maps maps, const Job p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  const uint32_t base = (uint32_t(__cvta_generic_to_shared(raw)) + 1023u) & ~1023u;
  const uint32_t out = base + kStages * kStage, scales = out + kOut, bars = scales + 8 * 256, scratches = bars + 128;
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  auto full = [&](int s) { return bars + 16 * s; };
  auto empty = [&](int s) { return bars + 16 * s + 8; };
  uint32_t rank = 0;
  if constexpr (kSplit > 1 || kMC > 1) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) { mb_init(full(i), 1); mb_init(empty(i), 4 * kWG * kMC); }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if constexpr (kMC > 1) cluster_sync(); else __syncthreads();
  // of the block's `tile`; kSplit blocks have the same, kMC blocks neighbouring ones along the outputs
  const int columns = p.N / (64 * kWG), t0 = kSplit > 1 ? p.steps / kSplit * int(rank) : 0, steps = p.steps / kSplit;
  const int lora_steps = kSplit > 1 && rank != 0 ? 0 : p.lora_steps, first_tile = blockIdx.x / kSplit, stride = gridDim.x / kSplit;
  if (warp >= 4 * kWG) {
#ifdef CREGS_SET
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
#endif
    if (warp == 4 * kWG && lane == 0) {
      int slot = 0; uint32_t par = 0;
#pragma unroll 1
      for (int tile = first_tile; tile < p.tiles; tile += stride) {
        const int n0 = tile % columns * 64 * kWG, m0 = tile / columns * kBatch;
#pragma unroll 1
        for (int t = -lora_steps; t < steps; ++t) {
          mb_wait(empty(slot), par ^ 1);
          const uint32_t to = base + slot * kStage;
          const int at = (t < 0 ? t + lora_steps : t0 + t) * 64;
#if BWD
          mb_expect(full(slot), kStage + 256);
#pragma unroll
          for (int g = 0; g < kWG; ++g) tma(to + g * 8192, &maps.w, n0 + g * 64, at, full(slot));
          bulk(scales + slot * 256, p.scale + at, 256, full(slot));
          const CUtensorMap* x = &maps.x;
#else
          mb_expect(full(slot), kStage);
          tma(to, t < 0 ? &maps.l : &maps.w, at, n0, full(slot));
          const CUtensorMap* x = t < 0 ? &maps.u : &maps.x;
#endif
          if constexpr (kMC > 1) tma_multicast(to + kWBytes + rank * (kXBytes / kMC), x, at, m0 + int(rank) * (kBatch / kMC), full(slot), (1 << kMC) - 1);
          else tma(to + kWBytes, x, at, m0, full(slot));
          if (++slot == kStages) slot = 0, par ^= 1;
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
#if BWD
  const uint32_t lrow = lane & 15, lchunk = warp % 4 * 2 + (lane >> 4), lbase = base + g * 8192 + lrow * 128;
#else
  const uint32_t lrow = g * 64 + warp % 4 * 16 + (lane & 15), lchunk = lane >> 4, lbase = base + lrow * 128;
#endif
  uint32_t loff[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) loff[j] = BWD ? j * 2048 + ((lchunk ^ (lrow & 7)) << 4) : ((2 * j + lchunk) ^ (lrow & 7)) << 4;
  const uint32_t scratch = scratches + warp * 512;
  const uint64_t desc0 = uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 16 | ((base + kWBytes) & 0x3ffff) >> 4;

  float acc[kBatch / 2];
  Rows rows;
  BlockKey bk[2];
  uint32_t a[2][4][4], rw[4] = {0, 0, 0, 0};
  int slot = 0; uint32_t par = 0;
  auto release = [&](int s) {
    if constexpr (kMC > 1) { if (lane < kMC) mb_arrive_remote(mapa(empty(s), lane)); }
    else if (lane == 0) mb_arrive(empty(s));
  };
  auto draw = [&](uint32_t (&f)[4][4], int t, int s, bool first) {   // W' of step t, in stage s
#pragma unroll
    for (int j = 0; j < 4; ++j) ldsm(f[j], lbase + s * kStage + loff[j]);
    if constexpr (K == R_RADEFRAG) {
      if (t % 4 == 0 || first) { const BlockKey b = block_key(d, t + (lane & 3)); RowKey r1[1] = {rows.key[0]}; uint32_t o[1][4]; philox<ROUNDS>(d, r1, b, o);
#pragma unroll
        for (int q = 0; q < 4; ++q) rw[q] = o[0][q]; }
      else { rw[0] = rw[1]; rw[1] = rw[2]; rw[2] = rw[3]; }
    }
    if constexpr (BWD) noise_bwd<K>(f, d, bk, t * 64, scales + s * 256, lane, scratch, first);
    else noise<K>(f, d, rows, t, lane, scratch, rw[0], first);
  };
  auto multiply = [&](uint32_t (&f)[4][4], int s) {
    hold(acc);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    const uint64_t b = desc0 + uint64_t(s * (kStage >> 4));
#pragma unroll
    for (int j = 0; j < 4; ++j) wg<kBatch>(acc, f[j], b + j * 2);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  };
  auto pin = [&](uint32_t (&f)[4][4]) {    // keeps ptxas from giving the operands' registers away before the wait
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(f[j][i])::"memory");
  };
#pragma unroll 1
  for (int tile = first_tile; tile < p.tiles; tile += stride) {
    const int n0 = tile % columns * 64 * kWG, m0 = tile / columns * kBatch;
    if constexpr (BWD) {
      bk[0] = block_key(d, (n0 + g * 64 + warp % 4 * 16) / 8); bk[1] = block_key(d, (n0 + g * 64 + warp % 4 * 16) / 8 + 1);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = n0 + g * 64 + row + 8 * i;
        rows.f[i] = p.scale[n];
        rows.s2[i] = packbf(rows.f[i], rows.f[i]);
        if constexpr (K == R_GAUSS || K == R_GAUSS16 || K == R_GAUSSFRAG) rows.f[i] *= kGauss;
        rows.key[i] = row_key(d, K == R_RADE ? n >> 4 : K == R_E2CHUNK ? (n >> 4) * 8 + (n & 7) : n);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch / 2; ++i) acc[i] = 0.0f;
    if constexpr (!BWD) {
#pragma unroll 1
      for (int t = 0; t < lora_steps; ++t) {
        mb_wait(full(slot), par);
#pragma unroll
        for (int j = 0; j < 4; ++j) ldsm(a[0][j], lbase + slot * kStage + loff[j]);
        multiply(a[0], slot);
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        hold(acc); pin(a[0]);
        release(slot);
        if (++slot == kStages) slot = 0, par ^= 1;
      }
#pragma unroll
      for (int i = 0; i < kBatch / 2; ++i) acc[i] *= p.scaling;
    }
    mb_wait(full(slot), par);
    draw(a[0], t0, slot, true);
    // steps is even
#pragma unroll 1
    for (int t = 0; t < steps; t += 2) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        multiply(a[h], slot);
        int next = slot + 1; uint32_t npar = par;
        if (next == kStages) next = 0, npar ^= 1;
        if (t + h + 1 < steps) {
          mb_wait(full(next), npar);
          draw(a[h ^ 1], t0 + t + h + 1, next, false);
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        hold(acc); pin(a[h]);
        release(slot);
        slot = next; par = npar;
      }
    }
    if constexpr (kSplit > 1) {             // one tile a block: the stages are free once every block is here
      constexpr int kPart = kBatch / 2 / kSplit, kSlot = 4 * kPart * 128 * kWG;   // sums a thread has of each block's share; bytes
      static_assert(kSlot * (kSplit - 1) <= kStages * kStage, "");
      cluster_sync();
      float own[kPart];
#pragma unroll
      for (int q = 0; q < kSplit; ++q) {
        if (q == int(rank)) {
#pragma unroll
          for (int i = 0; i < kPart; ++i) own[i] = acc[q * kPart + i];
        } else {
          const uint32_t to = mapa(base + ((rank - q - 1) & (kSplit - 1)) * kSlot + threadIdx.x * 16, q);
#pragma unroll
          for (int i = 0; i < kPart; i += 4)
            asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + i / 4 * 128 * kWG * 16), "f"(acc[q * kPart + i]), "f"(acc[q * kPart + i + 1]), "f"(acc[q * kPart + i + 2]), "f"(acc[q * kPart + i + 3]) : "memory");
        }
      }
      cluster_sync();
#pragma unroll
      for (int s = 0; s < kSplit - 1; ++s)
#pragma unroll
        for (int i = 0; i < kPart; i += 4) {
          float v[4];
          asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(base + s * kSlot + threadIdx.x * 16 + i / 4 * 128 * kWG * 16) : "memory");
#pragma unroll
          for (int e = 0; e < 4; ++e) own[i + e] += v[e];
        }
      write_out<kPart / 4>(own, p.y, &maps.y, out, g, warp, lane, n0, m0 + int(rank) * (kBatch / kSplit), p.N, p.M);
    } else {
      write_out<kBatch / 8>(acc, p.y, &maps.y, out, g, warp, lane, n0, m0, p.N, p.M);
    }
  }
#if EPI == 1
  if (warp % 4 == 0 && lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
  if constexpr (kMC > 1) { __syncwarp(); cluster_sync(); }
}

#ifndef RS2
#include "host.h"
#endif
