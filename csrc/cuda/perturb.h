// W + eps, or eps, in one pass.
#pragma once

#include "noise.h"

namespace flatlora {

constexpr int kPerturbThreads = 256;
constexpr int kPerturbSteps = 4;  // times 256 columns: what a warp does of its four rows

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

// A warp has four rows and kPerturbSteps blocks of 8 columns a lane. kVector: whole chunks of contiguous, 16-byte
// aligned columns, and row_offset a multiple of 4.
template <class T, Noise kind, bool kVector>
FLATLORA_KERNEL(kPerturbThreads, 2)
perturb_kernel(PerturbArgs args) {
  const int64_t chunks = (args.K + 7) / 8;
  const int64_t spans = (chunks + 32 * kPerturbSteps - 1) / (32 * kPerturbSteps);
  const int64_t item = gpu::block() * (kPerturbThreads / 32) + gpu::warp();
  const int64_t n = item / spans * 4;
  if (n >= args.N) return;
  const Draw draw = draw_of(args.noise, 0);
  Quad quad;
  set_rows<kind>(quad, draw, uint32_t(n));
  FLATLORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float* scale = args.noise.scale + (n + i) * args.noise.scale_stride;
    quad.factor[i] = n + i < args.N ? factor_of<kind>(draw, gpu::load_global<float>(scale)) : 0;
  }
  const int64_t from_stride = kVector ? 1 : args.weight.col_stride, to_stride = kVector ? 1 : args.out_col_stride;
  const T* from = static_cast<const T*>(args.weight.data);
  T* to = static_cast<T*>(args.out);
  FLATLORA_NO_UNROLL
  for (int step = 0; step < kPerturbSteps; ++step) {
    const int64_t chunk = (item % spans * kPerturbSteps + step) * 32 + gpu::lane();
    if (chunk >= chunks) break;
    const int64_t k = 8 * chunk, valid = args.K - k;
    Chunk<T> w[4] = {};
    FLATLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (from == nullptr || n + i >= args.N) break;
      const T* row = from + (n + i) * args.weight.row_stride + k * from_stride;
      w[i] = load_chunk<T, kVector>(row, from_stride, valid);
    }
    perturb_quad<kind, T, !kVector>(w, draw, quad, block_key(draw, uint32_t(chunk)));
    FLATLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (n + i >= args.N) break;
      T* row = to + (n + i) * args.out_row_stride + k * to_stride;
      store_chunk<T, kVector>(row, to_stride, valid, w[i]);
    }
  }
}

}  // namespace flatlora
