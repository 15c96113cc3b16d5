// W + eps, or eps, in one pass.
#pragma once

#include "noise.h"

namespace flatlora {

constexpr int kPerturbThreads = 256;
constexpr int kPerturbSteps = 4;

template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

// Drops the first element and appends another.
template <class T>
FLATLORA_DEVICE void push(Chunk<T>& w, uint32_t bits) {
  constexpr int kLast = 2 * int(sizeof(T)) - 1;
  FLATLORA_UNROLL
  for (int i = 0; i < kLast; ++i) w.v[i] = sizeof(T) == 2 ? w.v[i] >> 16 | w.v[i + 1] << 16 : w.v[i + 1];
  w.v[kLast] = sizeof(T) == 2 ? w.v[kLast] >> 16 | bits << 16 : bits;
}

// Columns of one row. kVector: 8 of them, 16-byte aligned.
template <class T, bool kVector>
FLATLORA_DEVICE Chunk<T> load_chunk(const T* p, int64_t stride, int64_t valid) {
  Chunk<T> w = {};
  if constexpr (kVector) {
    FLATLORA_UNROLL
    for (int half = 0; half < int(sizeof(T)) / 2; ++half) {
      const gpu::Words<4> words = gpu::load_global_once(p + 4 * half);
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) w.v[4 * half + i] = words.v[i];
    }
  } else {
    // Element by element through the last place; unrolled, the addresses alone would fill the registers.
    FLATLORA_NO_UNROLL
    for (int j = 0; j < 8; ++j) push<T>(w, j < valid ? gpu::load_global<Bits<T>>(p + j * stride) : 0);
  }
  return w;
}

template <class T, bool kVector>
FLATLORA_DEVICE void store_chunk(T* p, int64_t stride, int64_t valid, const Chunk<T>& w) {
  if constexpr (kVector) {
    FLATLORA_UNROLL
    for (int half = 0; half < int(sizeof(T)) / 2; ++half) {
      gpu::Words<4> words;
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) words.v[i] = w.v[4 * half + i];
      gpu::store_global(p + 4 * half, words);
    }
  } else {
    Chunk<T> rest = w;
    FLATLORA_NO_UNROLL
    for (int j = 0; j < 8 && j < valid; ++j) {
      gpu::store_global(p + j * stride, Bits<T>(rest.v[0]));
      push<T>(rest, 0);
    }
  }
}

// A warp has `kPatches` patches below each other and kPerturbSteps times 32 of them side by side.
template <Noise kind, bool kVector>
struct PerturbShape {
  using Own = Patch<kind>;
  // All 16 rows that a call of rademacher serves.
  static constexpr int kPatches = kind == Noise::kRademacher && kVector ? 4 : 1;
  static constexpr int kStep = 32 * 8 * Own::kCols;  // columns
  FLATLORA_INLINE static constexpr int64_t spans(int64_t K) {
    return (K + kPerturbSteps * kStep - 1) / (kPerturbSteps * kStep);
  }
  FLATLORA_INLINE static constexpr int64_t items(int64_t N, int64_t K) {
    return (Own::kUnit ? (N + 15) / 16 * 8 : (N + 4 * kPatches - 1) / (4 * kPatches)) * spans(K);
  }
  FLATLORA_INLINE static constexpr int64_t first_row(int64_t item, int64_t K) {
    const int64_t index = item / spans(K);
    return Own::kUnit ? index / 8 * 16 + index % 8 : index * (4 * kPatches);
  }
};

// kVector: whole chunks of contiguous, 16-byte aligned columns, and rows and columns that begin where the noise's
// patches may.
template <class T, Noise kind, bool kVector>
FLATLORA_KERNEL(kPerturbThreads, 2)
perturb_kernel(PerturbArgs args) {
  using Shape = PerturbShape<kind, kVector>;
  using Own = Patch<kind>;
  constexpr int kPatches = Shape::kPatches;
  const int64_t item = gpu::block() * (kPerturbThreads / 32) + gpu::warp(), n = Shape::first_row(item, args.K);
  if (n >= args.N) return;
  const Draw draw = draw_of(args.noise, 0);
  PatchRows<kind, T> rows;
  Factor<kind, T> factor[kPatches][4];
  FLATLORA_UNROLL
  for (int i = 0; i < 4 * kPatches; ++i) {
    const int64_t row = n + i / 4 * 4 + Own::row(i % 4);
    const float* scale = args.noise.scale + row * args.noise.scale_stride;
    factor[i / 4][i % 4] =
        row < args.N ? factor_of<kind, T>(draw, gpu::load_global<float>(scale)) : Factor<kind, T>(0);
  }
  const int64_t from_stride = kVector ? 1 : args.weight.col_stride, to_stride = kVector ? 1 : args.out_col_stride;
  const T* from = static_cast<const T*>(args.weight.data);
  T* to = static_cast<T*>(args.out);
  const int64_t first = item % Shape::spans(args.K) * (kPerturbSteps * Shape::kStep) + gpu::lane() * (8 * Own::kCols);
  const int bits = int(args.noise.tile_bits);
  const uint32_t row = draw.first_row + uint32_t(n), first_column = draw.first_block * 8;
  WalshRows walsh;
  if constexpr (kind != Noise::kHadamard)
    set_rows(rows, draw, uint32_t(n));
  else if constexpr (kVector)
    walsh = walsh_rows(draw, row, bits, first_column + uint32_t(first));
  FLATLORA_NO_UNROLL
  for (int step = 0; step < kPerturbSteps; ++step) {
    const int64_t k = first + step * Shape::kStep;
    if (k >= args.K) break;
    PatchBlocks<kind> blocks;
    uint32_t signs[1][4];
    if constexpr (kind != Noise::kHadamard) blocks = set_blocks<kind>(draw, uint32_t(k / 8));
    if constexpr (kPatches > 1) philox(draw, rows.key, blocks.key[0], signs);
    FLATLORA_UNROLL
    for (int p = 0; p < kPatches; ++p) {
      Chunk<T> w[4] = {};
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t r = n + 4 * p + Own::row(i), c = k + 8 * Own::col(i);
        if (from == nullptr || r >= args.N || c >= args.K) continue;
        w[i] = load_chunk<T, kVector>(from + r * args.weight.row_stride + c * from_stride, from_stride, args.K - c);
      }
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) rows.factor[i] = factor[p][i];
      if constexpr (kind == Noise::kHadamard) {
        uint32_t word = 0;
        if constexpr (kVector) {
          word = walsh_signs(draw, walsh, bits, first_column + uint32_t(k));
        } else {
          FLATLORA_NO_UNROLL
          for (uint32_t i = 0; i < 4; ++i)
            word |= walsh_signs(draw, row + i, bits, first_column + uint32_t(k)) << 8 * i;
        }
        add_signs<kind, T>(w, word, rows.factor);
      } else if constexpr (kPatches > 1) {
        add_signs<kind, T>(w, signs[0][p], rows.factor);
      } else if (kVector || begins_whole(args.noise)) {
        perturb_patch<kind, T>(w, draw, rows, blocks);
      } else {
        perturb_patch<kind, T, true>(w, draw, rows, blocks);
      }
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t r = n + 4 * p + Own::row(i), c = k + 8 * Own::col(i);
        if (r >= args.N || c >= args.K) continue;
        store_chunk<T, kVector>(to + r * args.out_row_stride + c * to_stride, to_stride, args.K - c, w[i]);
      }
    }
  }
}

}  // namespace flatlora
