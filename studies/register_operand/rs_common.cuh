#pragma once
// Skeleton, forward only: y[m, n] = sum_k x[m, k] (W + eps)[n, k] as y^T = W' x^T on sm_90a.
// A operand (64 rows of W') from registers, where the noise is added; B operand (kBatch rows of x) from shared memory.
// Block: kWG consumer warpgroups, each 64 outputs x kBatch rows of x; one producer warp for the copy engine.
#include "noise_study.cuh"
#include "wgmma_gen.h"
#include <cuda.h>
#ifndef BATCH
#define BATCH 256
#endif
#ifndef WG
#define WG 2
#endif
#ifndef CREGS
#define CREGS 240
#endif
#ifndef ROUNDS
#define ROUNDS 10
#endif
enum RsKind { R_NONE, R_RADE, R_E2FRAG, R_E2CHUNK, R_GAUSS, R_GAUSS16, R_RADEFRAG, R_GAUSSFRAG };
#ifndef SPLIT
#define SPLIT 1      // blocks of a cluster that share the contraction of one tile
#endif
#ifndef MC
#define MC 1         // 2: blocks of a cluster with neighbouring outputs share the tile of x by multicast
#endif
#ifndef EPI
#define EPI 1        // 0: 2-byte stores, as the study; 1: stmatrix.trans and tensor stores
#endif
#ifndef BWD
#define BWD 0        // input gradient
#endif
constexpr int kBatch = BATCH, kWG = WG, kSplit = SPLIT, kMC = MC;
constexpr int kWBytes = kWG * 64 * 128, kXBytes = kBatch * 128, kStage = kWBytes + kXBytes;
constexpr int kOut = EPI ? kWG * 8192 : 0;                 // two buffers of 32 rows x 64 outputs for each warpgroup
constexpr int kRest = kOut + 8 * 256 + 128 + kWG * 4 * 512 + 1024;   // scales (BWD), barriers, scratch, alignment
constexpr int kStages = (227 * 1024 - kRest) / kStage > 8 ? 8 : (227 * 1024 - kRest) / kStage;
constexpr int kShared = kStages * kStage + kRest;
DEV void mb_init(uint32_t b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(n) : "memory"); }
DEV void mb_arrive(uint32_t b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory"); }
DEV void mb_expect(uint32_t b, int n) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(n) : "memory"); }
DEV void mb_wait(uint32_t b, uint32_t par) {
  asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(b), "r"(par) : "memory");
}
DEV void tma(uint32_t to, const CUtensorMap* m, int c, int r, uint32_t bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(m), "r"(c), "r"(r), "r"(bar) : "memory");
}
DEV void ldsm(uint32_t (&r)[4], uint32_t p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p) : "memory");
}
template <int n> DEV void hold(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int b> DEV void wg(float (&d)[b / 2], const uint32_t (&a)[4], uint64_t desc) {
  if constexpr (b == 256) wgmma_rs_256(d, a, desc); else if constexpr (b == 192) wgmma_rs_192(d, a, desc); else if constexpr (b == 128) wgmma_rs_128(d, a, desc); else wgmma_rs_64(d, a, desc);
}
DEV uint32_t lds32(uint32_t p) { uint32_t v; asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(p)); return v; }
DEV void lds64(uint32_t& a, uint32_t& b, uint32_t p) { asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(p)); }
DEV void sts128(uint32_t p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) { asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(p), "r"(a), "r"(b), "r"(c), "r"(d) : "memory"); }

// Word i of lane c of four goes to word c of lane i.
DEV void transpose4(uint32_t (&w)[4], int c) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool up = c & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t got = __shfl_xor_sync(~0u, up ? w[i] : w[i + bit], bit);
      w[i] = up ? got : w[i]; w[i + bit] = up ? w[i + bit] : got;
    }
  }
}
// Two words, each 2 x 2 values of 5 bits: E2M2 patterns and their 4 x 4 Hadamard sums, as bf16x2 of n * 2^-128.
DEV void e2m2_h4(uint32_t wa, uint32_t wb, uint32_t (&z)[4]) {
  const uint32_t m = 0x81e081e0u;
  const uint32_t a = wa & m, b = __funnelshift_r(wa, wa, 5) & m, c = wb & m, d = __funnelshift_r(wb, wb, 5) & m;
  const uint32_t p = hadd2(a, b), q = hsub2(a, b), r = hadd2(c, d), s = hsub2(c, d);
  z[0] = hadd2(p, r); z[1] = hadd2(q, s); z[2] = hsub2(p, r); z[3] = hsub2(q, s);
}
constexpr float kGauss = 1.1774100225154747f;   // sqrt(2 ln 2): R = kGauss sqrt(-lg2 U)
struct Rows { RowKey key[2]; float f[2]; uint32_t s2[2]; };

// a: fragments of 64 columns, a[j][0] row r cols 16j + 2c, [1] row r + 8, [2] row r cols 16j + 8 + 2c, [3] row r + 8
template <int K> DEV void noise(uint32_t (&a)[4][4], const Key& d, const Rows& rows, uint32_t step, int lane, uint32_t scratch, uint32_t& rade_word, bool first = false) {
  const uint32_t c = lane & 3;
  if constexpr (K == R_NONE) {
  } else if constexpr (K == R_E2FRAG) {       // call: row n, columns 64 step + 8 j + 2 c + {0, 1}, j = 0..7
    const BlockKey bk = block_key(d, step * 4 + c);
    uint32_t w[2][4]; philox<ROUNDS>(d, rows.key, bk, w);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {           // words 2h, 2h + 1: chunks 4h .. 4h + 3
        uint32_t z[4]; e2m2_h4(w[i][2 * h], w[i][2 * h + 1], z);
#pragma unroll
        for (int t = 0; t < 4; ++t) { const int j = 4 * h + t; a[j / 2][i + 2 * (j % 2)] = hfma2(z[t], rows.s2[i], a[j / 2][i + 2 * (j % 2)]); }
      }
  } else if constexpr (K == R_E2CHUNK) {      // call: rows n, n + 8, columns 8 chunk .. + 7; word q: columns 2q, 2q + 1
    uint32_t w[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const BlockKey bk = block_key(d, step * 8 + 4 * h + c);
      RowKey r1[1] = {rows.key[0]}; uint32_t o[1][4]; philox<ROUNDS>(d, r1, bk, o);
#pragma unroll
      for (int q = 0; q < 4; ++q) w[h][q] = o[0][q];
      transpose4(w[h], c);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int t = 0; t < 4; t += 2) {        // chunks j, j + 1
        uint32_t z[4]; e2m2_h4(w[h][t], w[h][t + 1], z);
        const int j = 4 * h + t;
        a[j / 2][0] = hfma2(z[0], rows.s2[0], a[j / 2][0]); a[j / 2][1] = hfma2(z[1], rows.s2[1], a[j / 2][1]);
        a[j / 2][2] = hfma2(z[2], rows.s2[0], a[j / 2][2]); a[j / 2][3] = hfma2(z[3], rows.s2[1], a[j / 2][3]);
      }
  } else if constexpr (K == R_GAUSS || K == R_GAUSS16 || K == R_GAUSSFRAG) {  // v1: call row n, chunk j
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t w[2][4];
      const BlockKey bk = block_key(d, step * 8 + 4 * h + c);
      philox<ROUNDS>(d, rows.key, bk, w);
      if constexpr (K != R_GAUSSFRAG) { transpose4(w[0], c); transpose4(w[1], c); }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const int j = 4 * h + t; uint32_t& x = a[j / 2][i + 2 * (j % 2)];
          const float u = asf(__byte_perm(w[i][t], 0x4b00u, 0x5410u)), v = asf(__byte_perm(w[i][t], 0x4b00u, 0x5432u));
          const float U = fmaf(u, 0x1p-16f, -0x1.fffffep+6f), th = fmaf(v, 0x1.921fb6p-14f, -0x1.921fb6p+9f);
          const float R = sq(-lg2(U)) * rows.f[i];
          if constexpr (K == R_GAUSS) x = packbf(fmaf(R, cs(th), asf(x << 16)), fmaf(R, sn(th), asf(x & 0xffff0000u)));
          else x = hadd2(x, packbf(R * cs(th), R * sn(th)));
        }
    }
  } else if constexpr (K == R_RADE) {         // v1: call 16 rows, chunk; a lane draws one of 32 chunks every 4 steps
    if (step % 4 == 0 || first) {
      const BlockKey bk = block_key(d, (step & ~3u) * 8 + lane);
      RowKey r1[1] = {rows.key[0]}; uint32_t o[1][4]; philox<ROUNDS>(d, r1, bk, o);
      __syncwarp(); sts128(scratch + lane * 16, o[0][0], o[0][2], o[0][1], o[0][3]); __syncwarp();
    }
    const uint32_t r = lane >> 2, at = scratch + (step % 4) * 128 + (r >> 2) * 8;   // words of rows r and r + 8
    const uint32_t se = 7 - 2 * c, so = 6 - 2 * c, sel = 0x4000u + 0x1010u * (r & 3);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t w[2]; lds64(w[0], w[1], at + j * 16);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t sg = __byte_perm(w[i] << se, w[i] << so, sel);
        uint32_t& x = a[j / 2][i + 2 * (j % 2)];
        x = hadd2(x, lop_and_xor(rows.s2[i], sg, 0x80008000u));
      }
    }
  } else if constexpr (K == R_RADEFRAG) {     // call: rows n, n + 8, columns 256 J + 64 t + 8 j + 2 c + e: word t, bit 16 e + 15 - (2 j + i)
    // here one call every step for simplicity of the loop / 4: see R_RADEFRAG4 count
    const uint32_t w = rade_word;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) { uint32_t& x = a[j / 2][i + 2 * (j % 2)]; x = hadd2(x, lop_and_xor(rows.s2[i], w << (2 * j + i), 0x80008000u)); }
  }
}

