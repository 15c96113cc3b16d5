// Tiles of W + eps, kWidth rows by kWidth columns, in either orientation. This is the only place where the CPU
// backend draws: forward, input gradient and perturb take their values from here, so that all see the same bits.
#pragma once

#include "args.h"
#include "simd.h"

namespace flatlora {
namespace FLATLORA_ISA {

constexpr int W = kWidth;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The noise of one row group.
struct Draw {
  Noise kind;
  PhiloxKey key;
  uint32_t stream, sample;
  float sign;
  uint32_t row_offset, col_offset;
  const float* scale;
  int64_t scale_stride;
};

inline Draw make_draw(const NoiseArgs& noise, int64_t group) {
  const int64_t sample = noise.sample_offset + group;
  const bool drawn = Noise(noise.kind) != Noise::kNone;
  return {Noise(noise.kind),
          PhiloxKey(drawn ? uint64_t(*noise.seed) : 0),
          uint32_t(noise.stream),
          uint32_t(noise.antithetic ? sample >> 1 : sample),
          noise.antithetic && (sample & 1) ? -1.0f : 1.0f,
          uint32_t(noise.row_offset),
          uint32_t(noise.col_offset),
          noise.scale,
          noise.scale_stride};
}

// The Rademacher signs of a region of at most kRegionLong rows x kRegionShort columns, or the other way round: a byte
// per row and block of 8 columns, as the words hold them. One call of Philox covers 16 rows of a block, so they are
// drawn with lanes across blocks.
constexpr int64_t kRegionLong = 256, kRegionShort = 64;
struct Signs {
  // Rows of whole groups times blocks of whole vectors, and what a 32-bit gather reads past the last byte.
  uint8_t bytes[(kRegionLong + 32) * 16 + 4];
  uint32_t first_row, stride;
};

inline void draw_signs(const Draw& d, int64_t n0, int64_t rows, int64_t k0, int64_t cols, Signs& out) {
  const uint32_t first = d.row_offset + uint32_t(n0), first_block = (d.col_offset + uint32_t(k0)) >> 3;
  const uint32_t blocks = uint32_t(ceil_div(cols, 8)), first_group = first >> 4;
  const uint32_t groups = ((first + uint32_t(rows) - 1) >> 4) - first_group + 1;
  out.first_row = first_group << 4;
  out.stride = uint32_t(ceil_div(blocks, W)) * W;
  for (uint32_t g = 0; g < groups; ++g)
    for (uint32_t b = 0; b < blocks; b += W) {
      const I block = add(iota(), splat(I(), first_block + b));
      Words c[4] = {split(block), splat(Words(), first_group + g), splat(Words(), d.stream), splat(Words(), d.sample)};
      philox_rounds(c, d.key);
      for (int q = 0; q < 4; ++q) store_bytes(out.bytes + (g * 16 + 4 * q) * out.stride + b, out.stride, join(c[q]));
    }
}

// What kWidth consecutive rows have in common along k.
struct RowLanes {
  F scale;            // zero past the last row
  float scales[W];    // the same
  Words rows;         // gaussian: global row indices
  I offsets;          // rademacher: where a row's signs lie
  uint32_t signs[W];  // the same
};

inline void make_row_lanes(const Draw& d, int64_t n0, int64_t rows, const Signs& signs, RowLanes& lanes) {
  if (d.kind == Noise::kNone) return;
  for (int i = 0; i < W; ++i) lanes.scales[i] = i < rows ? d.sign * d.scale[(n0 + i) * d.scale_stride] : 0.0f;
  lanes.scale = load(lanes.scales);
  const uint32_t first = d.row_offset + uint32_t(n0);
  if (d.kind == Noise::kGaussian) {
    lanes.rows = split(add(iota(), splat(I(), first)));
  } else {
    // Rows past the end may not have been drawn: any signs will do, their scale is zero.
    for (int i = 0; i < W; ++i) lanes.signs[i] = (first - signs.first_row + (i < rows ? i : 0)) * signs.stride;
    lanes.offsets = load_words(lanes.signs);
  }
}

// The blocks of a tile's width, side by side: their rounds interleave, where one alone would wait for its multiplies.
struct Blocks {
  Words block[W / 8];
};
SIMD void mulhilo(uint32_t m, const Blocks& x, Blocks& hi, Blocks& lo) {
  for (int b = 0; b < W / 8; ++b) mulhilo(m, x.block[b], hi.block[b], lo.block[b]);
}
SIMD Blocks xor3(const Blocks& x, const Blocks& y, uint32_t key) {
  Blocks result;
  for (int b = 0; b < W / 8; ++b) result.block[b] = xor3(x.block[b], y.block[b], key);
  return result;
}

// Several words at once through gaussian_pair: one load of a constant serves all, and their chains overlap.
constexpr int kAtOnce = 2;
#define EACH for (int i = 0; i < kAtOnce; ++i)
template <class V>
struct Several {
  V v[kAtOnce];
};
using Floats = Several<F>;
using Ints = Several<I>;
#define MAP(TYPE, EXPRESSION)    \
  TYPE result;                   \
  EACH result.v[i] = EXPRESSION; \
  return result
SIMD Floats splat(const Floats&, float x) { MAP(Floats, splat(F(), x)); }
SIMD Ints splat(const Ints&, uint32_t x) { MAP(Ints, splat(I(), x)); }
SIMD Floats add(const Floats& x, const Floats& y) { MAP(Floats, add(x.v[i], y.v[i])); }
SIMD Floats mul(const Floats& x, const Floats& y) { MAP(Floats, mul(x.v[i], y.v[i])); }
SIMD Floats fma(const Floats& x, const Floats& y, const Floats& z) { MAP(Floats, fma(x.v[i], y.v[i], z.v[i])); }
SIMD Floats sqrt(const Floats& x) { MAP(Floats, sqrt(x.v[i])); }
SIMD Floats as_float(const Ints& x) { MAP(Floats, as_float(x.v[i])); }
SIMD Ints as_int(const Floats& x) { MAP(Ints, as_int(x.v[i])); }
SIMD Ints add(const Ints& x, const Ints& y) { MAP(Ints, add(x.v[i], y.v[i])); }
SIMD Ints and_or(const Ints& x, const Ints& mask, const Ints& bits) { MAP(Ints, and_or(x.v[i], mask.v[i], bits.v[i])); }
template <int kBits>
SIMD Ints shift_right(const Ints& x) {
  MAP(Ints, shift_right<kBits>(x.v[i]));
}
SIMD Floats exponent(const Ints& x) { MAP(Floats, exponent(x.v[i])); }
SIMD Floats flip_sign(const Floats& x, const Ints& word) { MAP(Floats, flip_sign(x.v[i], word.v[i])); }
#undef MAP

// eps of kWidth rows and kWidth columns from `k` of the weight, `region_col` of the signs: e[j] is a column, with lanes
// along n.
SIMD void eps_columns(const Draw& d, const RowLanes& lanes, const Signs& signs, int64_t k, int64_t region_col,
                      F (&e)[W]) {
  if (d.kind == Noise::kGaussian) {
    const uint32_t block = (d.col_offset + uint32_t(k)) >> 3;
    Blocks c[4];
    for (int b = 0; b < W / 8; ++b) {
      Words begun[4];
      philox_rows_begin(block + b, lanes.rows, d.stream, d.sample, d.key, begun);
      for (int i = 0; i < 4; ++i) c[i].block[b] = begun[i];
    }
    philox_rounds(c, d.key, 3);
    for (int b = 0; b < W / 8; ++b)
      for (int q = 0; q < 4; q += kAtOnce) {
        Ints word;
        Floats scale, even, odd;
        EACH word.v[i] = join(c[q + i].block[b]);
        EACH scale.v[i] = lanes.scale;
        gaussian_pair(word, scale, even, odd);
        EACH e[8 * b + 2 * (q + i)] = even.v[i];
        EACH e[8 * b + 2 * (q + i) + 1] = odd.v[i];
      }
  } else {
    const I bits = gather(signs.bytes + (region_col >> 3), lanes.offsets);
    for (uint32_t j = 0; j < W; ++j) e[j] = flip_sign(lanes.scale, shift_left(bits, splat(I(), 31 - j)));
  }
}

// The same tile with lanes along k: e[i] is a row.
SIMD void eps_rows(const Draw& d, const RowLanes& lanes, const Signs& signs, int64_t k, int64_t region_col, F (&e)[W]) {
  if (d.kind == Noise::kGaussian) {
    eps_columns(d, lanes, signs, k, region_col, e);
    transpose(e);
  } else {
    const uint8_t* bytes = signs.bytes + (region_col >> 3);
    for (int i = 0; i < W; ++i) e[i] = flip_signs(lanes.scales[i], bytes + lanes.signs[i]);
  }
}

template <class T>
struct Weight {
  const T* data;
  int64_t row_stride, col_stride, N, K;
};

template <class T>
Weight<T> make_weight(const WeightArgs& w, int64_t N, int64_t K) {
  return {static_cast<const T*>(w.data), w.row_stride, w.col_stride, N, K};
}

// r[i] = row n0 + i, lanes along k; zero outside the weight.
template <class T>
SIMD void load_rows(const Weight<T>& w, int64_t n0, int64_t k0, F (&r)[W]) {
  const int rows = int(min64(W, w.N - n0)), cols = int(min64(W, w.K - k0));
  const T* p = w.data + n0 * w.row_stride + k0 * w.col_stride;
  if (w.col_stride == 1 && rows == W && cols == W) {
    for (int i = 0; i < W; ++i) r[i] = load(p + i * w.row_stride);
  } else if (w.col_stride == 1) {
    for (int i = 0; i < W; ++i) r[i] = i < rows ? load(p + i * w.row_stride, cols) : splat(F(), 0.0f);
  } else {
    T lanes[W] = {};
    for (int i = 0; i < W; ++i) {
      for (int j = 0; j < cols; ++j) lanes[j] = i < rows ? p[i * w.row_stride + j * w.col_stride] : T();
      r[i] = load(lanes);
    }
  }
}

// r[j] = column k0 + j, lanes along n.
template <class T>
SIMD void load_cols(const Weight<T>& w, int64_t n0, int64_t k0, F (&r)[W]) {
  if (w.row_stride == 1 && w.col_stride != 1) {
    const Weight<T> transposed = {w.data, w.col_stride, 1, w.K, w.N};
    load_rows(transposed, k0, n0, r);
  } else {
    load_rows(w, n0, k0, r);
    transpose(r);
  }
}

// Asks for the tile at (n0, k0) ahead of its use: rows far apart defeat the hardware's prefetcher.
template <class T>
SIMD void prefetch_tile(const Weight<T>& w, int64_t n0, int64_t k0) {
  if (w.data == nullptr || n0 >= w.N || k0 >= w.K) return;
  const bool column_major = w.row_stride == 1 && w.col_stride != 1;
  const T* p = w.data + n0 * w.row_stride + k0 * w.col_stride;
  const int64_t stride = column_major ? w.col_stride : w.row_stride;
  const int64_t lines = min64(W, column_major ? w.K - k0 : w.N - n0);
  for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(p + i * stride, 0, 2);
}

// The tile of W + eps at (n0, k0). kLanesN: r[j] is column k0 + j with lanes along n, else r[i] is row n0 + i with
// lanes along k. `region_col`: k0 less the first column of the region of `signs`.
template <bool kLanesN, class T>
SIMD void perturbed_tile(const Weight<T>& w, const Draw& d, const RowLanes& lanes, const Signs& signs, int64_t n0,
                         int64_t k0, int64_t region_col, F (&r)[W]) {
  const bool column_major = w.row_stride == 1 && w.col_stride != 1;
  // Signs are cheapest along k, where they are masks; gaussian lanes come along n.
  const bool lanes_n = column_major || (kLanesN && d.kind != Noise::kRademacher);
  if (w.data == nullptr) {
    for (int i = 0; i < W; ++i) r[i] = splat(F(), 0.0f);
  } else if (lanes_n) {
    load_cols(w, n0, k0, r);
  } else {
    load_rows(w, n0, k0, r);
  }
  if (d.kind != Noise::kNone) {
    F e[W];
    if (lanes_n) {
      eps_columns(d, lanes, signs, k0, region_col, e);
    } else {
      eps_rows(d, lanes, signs, k0, region_col, e);
    }
    for (int i = 0; i < W; ++i) r[i] = add(r[i], e[i]);
  }
  if (lanes_n != kLanesN) transpose(r);
}

}  // namespace FLATLORA_ISA
}  // namespace flatlora
