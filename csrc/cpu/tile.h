// Tiles of W + eps, kWidth rows by kWidth columns, in either orientation. The CPU backend draws here and in region.h
// alone: forward, input gradient and perturb take their values from these, so that all see the same bits.
#pragma once

#include "packed.h"

namespace flatlora {
namespace FLATLORA_ISA {

// What kWidth consecutive rows have in common along k.
struct RowLanes {
  F scale;            // zero past the last row
  float scales[W];    // the same
  Words rows;         // gaussian: global row indices
  I offsets;          // other kinds: where a row lies in the region
  uint32_t begins[W];  // the same
};

inline void make_row_lanes(const Draw& d, int64_t n0, int64_t rows, const Region& region, RowLanes& lanes) {
  if (d.kind == Noise::kNone) return;
  for (int i = 0; i < W; ++i) lanes.scales[i] = i < rows ? d.factor(n0 + i) : 0.0f;
  lanes.scale = load(lanes.scales);
  const uint32_t first = d.row_offset + uint32_t(n0);
  if (d.kind == Noise::kGaussian) {
    lanes.rows = split(add(iota(), splat(I(), first)));
  } else {
    // Rows past the end may not have been drawn: any values will do, their scale is zero.
    for (int i = 0; i < W; ++i) lanes.begins[i] = region.row(first + uint32_t(i < rows ? i : 0));
    lanes.offsets = load_words(lanes.begins);
  }
}

// Several words at once through gaussian_pair: one load of a constant serves all, and their chains overlap.
#if defined(__AVX512F__)
constexpr int kAtOnce = 2;
#else
constexpr int kAtOnce = 4;
#endif
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

// take(j, even, odd): columns k + j and k + j + 1 of gaussian eps, with lanes along n.
template <class Take>
SIMD void each_two_columns(const Draw& d, const RowLanes& lanes, int64_t k, const Take& take) {
  Beside<W / 8> c[4];
  philox_beside((d.col_offset + uint32_t(k)) >> 3, lanes.rows, d, c);
  for (int b = 0; b < W / 8; ++b)
    for (int q = 0; q < 4; q += kAtOnce) {
      Ints word;
      Floats scale, even, odd;
      EACH word.v[i] = join(c[q + i].call[b]);
      EACH scale.v[i] = lanes.scale;
      gaussian_pair(word, scale, even, odd);
      EACH take(8 * b + 2 * (q + i), even.v[i], odd.v[i]);
    }
}

// eps of kWidth rows and kWidth columns from `k` of the weight: e[i] is a row, with lanes along k; or, of gaussian,
// e[j] a column, with lanes along n.
SIMD void gaussian_columns(const Draw& d, const RowLanes& lanes, int64_t k, F (&e)[W]) {
  each_two_columns(d, lanes, k, [&](int j, F even, F odd) { e[j] = even, e[j + 1] = odd; });
}

SIMD void near_gaussian_rows(const Draw& d, const RowLanes& lanes, const Region& region, int64_t k, F (&e)[W]) {
  const uint8_t* values = region.bytes + region.col(d, k);
  for (int i = 0; i < W; ++i)
    e[i] = mul(splat(F(), lanes.scales[i]), load(reinterpret_cast<const int8_t*>(values + lanes.begins[i])));
}

SIMD void sign_columns(const Draw& d, const RowLanes& lanes, const Region& region, int64_t k, F (&e)[W]) {
  const I bits = gather(region.bytes + region.col(d, k), lanes.offsets);
  for (uint32_t j = 0; j < W; ++j) e[j] = flip_sign(lanes.scale, shift_left(bits, splat(I(), 31 - j)));
}
SIMD void sign_rows(const Draw& d, const RowLanes& lanes, const Region& region, int64_t k, F (&e)[W]) {
  const uint8_t* bytes = region.bytes + region.col(d, k);
  for (int i = 0; i < W; ++i) e[i] = flip_signs(lanes.scales[i], bytes + lanes.begins[i]);
}

template <bool kLanesN>
SIMD void eps_tile(const Draw& d, const RowLanes& lanes, const Region& region, int64_t k, F (&e)[W]) {
  if (d.kind == Noise::kGaussian) {
    gaussian_columns(d, lanes, k, e);
    if (!kLanesN) transpose(e);
  } else if (d.kind == Noise::kNearGaussian) {
    near_gaussian_rows(d, lanes, region, k, e);
    if (kLanesN) transpose(e);
  } else if (kLanesN) {
    sign_columns(d, lanes, region, k, e);
  } else {
    sign_rows(d, lanes, region, k, e);
  }
}

template <class T>
struct Weight {
  const T* data;
  int64_t row_stride, col_stride, N, K;
  const PackedArgs* packed = nullptr;
};

template <class T>
Weight<T> make_weight(const WeightArgs& w, int64_t N, int64_t K) {
  return {static_cast<const T*>(w.data), w.row_stride, w.col_stride, N, K, w.packed};
}

// What lies at `p` as the weight from (n0, k0) on: it goes on counting from the weight's first.
template <class T>
SIMD Weight<T> part(const Weight<T>& w, const T* p, int64_t n0, int64_t k0, int64_t row_stride, int64_t col_stride) {
  const uintptr_t first = uintptr_t(p) - uintptr_t(n0 * row_stride + k0 * col_stride) * sizeof(T);
  return {reinterpret_cast<const T*>(first), row_stride, col_stride, w.N, w.K, nullptr};
}

// The weight itself; or, where it is packed, these rows and columns of it, decoded into `room` (rows * cols).
template <class T>
SIMD Weight<T> decoded(const Weight<T>& w, int64_t n0, int64_t rows, int64_t k0, int64_t cols, T* room) {
  if (w.packed == nullptr) return w;
  decode(*w.packed, n0, k0, min64(rows, w.N - n0), min64(cols, w.K - k0), room, cols);
  return part(w, room, n0, k0, cols, 1);
}
// The same of at most W rows, by columns (`room` is W * cols) where that is as good.
template <class T>
SIMD Weight<T> decoded_columns(const Weight<T>& w, int64_t n0, int64_t rows, int64_t k0, int64_t cols, T* room) {
  if (w.packed && decode_columns(*w.packed, n0, k0, min64(rows, w.N - n0), min64(cols, w.K - k0), room))
    return part(w, room, n0, k0, 1, W);
  return decoded(w, n0, rows, k0, cols, room);
}

// take(i, x): row n0 + i, lanes along k; zero outside the weight.
template <class T, class Take>
SIMD void each_row(const Weight<T>& w, int64_t n0, int64_t k0, const Take& take) {
  const int rows = int(min64(W, w.N - n0)), cols = int(min64(W, w.K - k0));
  const T* p = w.data + n0 * w.row_stride + k0 * w.col_stride;
  if (w.data == nullptr) {
    for (int i = 0; i < W; ++i) take(i, splat(F(), 0.0f));
  } else if (w.col_stride == 1 && rows == W && cols == W) {
    for (int i = 0; i < W; ++i) take(i, load(p + i * w.row_stride));
  } else if (w.col_stride == 1) {
    for (int i = 0; i < W; ++i) take(i, i < rows ? load(p + i * w.row_stride, cols) : splat(F(), 0.0f));
  } else {
    T lanes[W] = {};
    for (int i = 0; i < W; ++i) {
      for (int j = 0; j < cols; ++j) lanes[j] = i < rows ? p[i * w.row_stride + j * w.col_stride] : T();
      take(i, load(lanes));
    }
  }
}
template <class T>
SIMD void load_rows(const Weight<T>& w, int64_t n0, int64_t k0, F (&r)[W]) {
  each_row(w, n0, k0, [&](int i, F x) { r[i] = x; });
}
template <class T>
SIMD void add_rows(const Weight<T>& w, int64_t n0, int64_t k0, F (&r)[W]) {
  each_row(w, n0, k0, [&](int i, F x) { r[i] = add(x, r[i]); });
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
// lanes along k.
template <bool kLanesN, class T>
SIMD void perturbed_tile(const Weight<T>& w, const Draw& d, const RowLanes& lanes, const Region& region, int64_t n0,
                         int64_t k0, F (&r)[W]) {
  const bool column_major = w.row_stride == 1 && w.col_stride != 1;
  // Gaussian lanes come along n; of the other kinds those along k are cheaper.
  const bool lanes_n = column_major || (kLanesN && d.kind <= Noise::kGaussian);
  // Drawn before W is loaded, which would wait in registers that drawing needs.
  if (d.kind == Noise::kNone) {
    lanes_n ? load_cols(w, n0, k0, r) : load_rows(w, n0, k0, r);
  } else if (lanes_n) {
    F e[W];
    eps_tile<true>(d, lanes, region, k0, e);
    load_cols(w, n0, k0, r);
    for (int i = 0; i < W; ++i) r[i] = add(r[i], e[i]);
  } else {
    eps_tile<false>(d, lanes, region, k0, r);
    add_rows(w, n0, k0, r);
  }
  if (lanes_n != kLanesN) transpose(r);
}

}  // namespace FLATLORA_ISA
}  // namespace flatlora
