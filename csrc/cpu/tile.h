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
  uint64_t seed;
  uint32_t stream, sample;
  float sign;
  uint32_t row_offset, col_offset;
  const float* scale;
  int64_t scale_stride;
};

inline Draw make_draw(const NoiseArgs& noise, int64_t group) {
  const int64_t sample = noise.sample_offset + group;
  Draw d;
  d.kind = Noise(noise.kind);
  d.seed = d.kind == Noise::kNone ? 0 : uint64_t(*noise.seed);
  d.stream = uint32_t(noise.stream);
  d.sample = uint32_t(noise.antithetic ? sample >> 1 : sample);
  d.sign = noise.antithetic && (sample & 1) ? -1.0f : 1.0f;
  d.row_offset = uint32_t(noise.row_offset);
  d.col_offset = uint32_t(noise.col_offset);
  d.scale = noise.scale;
  d.scale_stride = noise.scale_stride;
  return d;
}

// Rademacher words of a region of at most kRegionRows x kRegionCols, or the other way round: one call of Philox covers
// 16 rows x 8 columns, so they are drawn with lanes across calls and picked apart by row.
constexpr int kRegionLong = 256, kRegionShort = 64;
struct SignWords {
  static constexpr int kCapacity = 192;  // >= (64/16 + 1) * 256/8 and (256/16 + 1) * 64/8, a multiple of kWidth
  uint32_t words[4][kCapacity];
  uint32_t first_group, blocks;
};

inline void draw_signs(const Draw& d, int64_t n0, int64_t rows, int64_t k0, int64_t cols, SignWords& out) {
  const uint32_t first_row = d.row_offset + uint32_t(n0), first_block = (d.col_offset + uint32_t(k0)) >> 3;
  out.first_group = first_row >> 4;
  out.blocks = uint32_t(ceil_div(cols, 8));
  const uint32_t groups = ((first_row + uint32_t(rows) - 1) >> 4) - out.first_group + 1;
  const uint32_t count = groups * out.blocks;
  for (uint32_t t = 0; t < count; t += W) {
    uint32_t c0[W], c1[W];
    for (uint32_t i = 0; i < W; ++i) {
      c0[i] = first_block + (t + i) % out.blocks;
      c1[i] = out.first_group + (t + i) / out.blocks;
    }
    Words c[4] = {split(load_words(c0)), split(load_words(c1)), splat(Words(), d.stream), splat(Words(), d.sample)};
    philox_rounds(c, d.seed);
    for (int q = 0; q < 4; ++q) store_words(&out.words[q][t], join(c[q]));
  }
}

// What kWidth consecutive rows have in common along k.
struct RowLanes {
  F scale;      // zero past the last row
  Words rows;   // gaussian: global row indices
  I index, up;  // rademacher: where a row's word lies, and the shift that lifts its byte to the top
};

inline RowLanes make_row_lanes(const Draw& d, int64_t n0, int64_t rows, const SignWords& signs) {
  RowLanes lanes;
  if (d.kind == Noise::kNone) return lanes;
  float scale[W];
  for (int i = 0; i < W; ++i) scale[i] = i < rows ? d.sign * d.scale[(n0 + i) * d.scale_stride] : 0.0f;
  lanes.scale = load(scale);
  const uint32_t first = d.row_offset + uint32_t(n0);
  if (d.kind == Noise::kGaussian) {
    lanes.rows = split(add(iota(), splat(I(), first)));
  } else {
    uint32_t index[W], up[W];
    for (uint32_t i = 0; i < W; ++i) {
      // Rows past the end may belong to a group that was not drawn: any word will do, their scale is zero.
      const uint32_t n = i < rows ? first + i : first;
      index[i] = ((n & 15) >> 2) * SignWords::kCapacity + ((n >> 4) - signs.first_group) * signs.blocks;
      up[i] = 24 - 8 * (n & 3);
    }
    lanes.index = load_words(index);
    lanes.up = load_words(up);
  }
  return lanes;
}

// eps of kWidth rows (the lanes) and the 8 columns of local block `block`, which begins at column 8 * block of the
// region that `signs` was drawn for, and at `k` of the weight.
SIMD void eps_block(const Draw& d, const RowLanes& lanes, const SignWords& signs, int64_t k, uint32_t block, F* e) {
  if (d.kind == Noise::kGaussian) {
    Words c[4];
    philox_rows((d.col_offset + uint32_t(k)) >> 3, lanes.rows, d.stream, d.sample, d.seed, c);
    for (int q = 0; q < 4; ++q) gaussian_pair(join(c[q]), lanes.scale, e[2 * q], e[2 * q + 1]);
  } else {
    const I top = shift_left(gather(signs.words[0], add(lanes.index, splat(I(), block))), lanes.up);
    for (uint32_t j = 0; j < 8; ++j) e[j] = flip_sign(lanes.scale, shift_left(top, splat(I(), 7 - j)));
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

// The tile of W + eps at (n0, k0). kLanesN: r[j] is column k0 + j with lanes along n, else r[i] is row n0 + i with
// lanes along k. `region_col`: k0 less the first column of the region of `signs`.
template <bool kLanesN, class T>
SIMD void perturbed_tile(const Weight<T>& w, const Draw& d, const RowLanes& lanes, const SignWords& signs, int64_t n0,
                         int64_t k0, int64_t region_col, F (&r)[W]) {
  const bool column_major = w.row_stride == 1 && w.col_stride != 1;
  const bool load_lanes_n = w.data != nullptr && (kLanesN || column_major);
  if (w.data == nullptr) {
    for (int i = 0; i < W; ++i) r[i] = splat(F(), 0.0f);
  } else if (load_lanes_n) {
    load_cols(w, n0, k0, r);
  } else {
    load_rows(w, n0, k0, r);
  }
  if (d.kind != Noise::kNone) {
    F e[W];
    for (int b = 0; b < W / 8; ++b) eps_block(d, lanes, signs, k0 + 8 * b, uint32_t(region_col >> 3) + b, e + 8 * b);
    if (!kLanesN && !load_lanes_n) transpose(e);
    for (int i = 0; i < W; ++i) r[i] = add(r[i], e[i]);
  }
  if (!kLanesN && load_lanes_n) transpose(r);
}

}  // namespace FLATLORA_ISA
}  // namespace flatlora
