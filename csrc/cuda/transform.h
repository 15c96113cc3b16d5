// y (+)= a eps^T, or a eps, of hadamard noise: a fast Walsh transform of `a`. W is not read.
//
// A block has one row of `a` and one tile of T outputs, and goes through the tiles of the contraction. Of each it takes
//     in sign * a   ->   the transform   ->   + out sign * that,  at output rev(h) for place h of the transform,
// with the signs of rows and columns of the weight on either side: columns come in and rows go out, in the input
// gradient the other way round. noise_scale belongs to the rows.
#pragma once

#include "noise.h"

namespace flatlora {

// What both kernels know of a block.
struct TransformBlock {
  Draw draw;
  int64_t m, in_length, out_length;
  uint32_t in_first, out_first;  // of the tensors in the whole weight
  uint32_t in_kind, out_kind;  // of signs
  uint32_t tile;  // of outputs
  uint32_t tiles_begin, tiles_count;  // of the contraction

  // `bits`: of a tile.
  FLATLORA_DEVICE TransformBlock(const TransformArgs& args, int bits) {
    const NoiseArgs& noise = args.noise;
    const bool backward = args.input_grad != 0;
    in_length = backward ? args.N : args.K;
    out_length = backward ? args.K : args.N;
    in_first = uint32_t(backward ? noise.row_offset : noise.col_offset);
    out_first = uint32_t(backward ? noise.col_offset : noise.row_offset);
    in_kind = backward ? kRowSigns : kColumnSigns;
    out_kind = backward ? kColumnSigns : kRowSigns;
    const uint32_t out_tiles = tiles_of(out_first, out_length, bits);
    m = gpu::block() / out_tiles;
    tile = (out_first >> bits) + uint32_t(gpu::block() % out_tiles);
    tiles_begin = in_first >> bits;
    tiles_count = tiles_of(in_first, in_length, bits);
    draw = draw_of(noise, m / (args.M / noise.samples));
  }
  FLATLORA_INLINE static uint32_t tiles_of(uint32_t first, int64_t length, int bits) {
    return uint32_t((int64_t(first) + length - 1) >> bits) - (first >> bits) + 1;
  }
};

template <class T>
FLATLORA_DEVICE float number_at(const void* data, int64_t index) {
  if constexpr (sizeof(T) == 4)
    return gpu::load_global<float>(static_cast<const float*>(data) + index);
  else
    return to_float(T{gpu::load_global<uint16_t>(static_cast<const uint16_t*>(data) + index)});
}
// What multiplies a row's signs.
template <class T>
FLATLORA_DEVICE float sign_factor(const Draw& draw, float scale) {
  if constexpr (kPairs<Noise::kHadamard, T>)
    return to_float(T{}, factor_of<Noise::kHadamard, T>(draw, scale));
  else
    return factor_of<Noise::kHadamard, T>(draw, scale);
}
template <class T>
FLATLORA_DEVICE void store_number(void* y, int64_t index, float x) {
  if constexpr (sizeof(T) == 4)
    gpu::store_global(static_cast<float*>(y) + index, x);
  else
    gpu::store_global(static_cast<uint16_t*>(y) + index, uint16_t(pack(T{}, x, 0.0f)));
}
// x, negated where bit `i` of `bits` is 1.
FLATLORA_DEVICE float with_sign(float x, uint32_t bits, int i) {
  return as_float(gpu::xor_masked(as_int(x), bits << (31 - i), 0x80000000u));
}

// --- Tiles of 512 and more: 16 values a thread ---

template <int kBits>
struct Walsh {
  static constexpr int kSize = 1 << kBits, kThreads = kSize / 16;
  static constexpr uint32_t kSignBytes = kSize / 8;
  // On a processor at a time, which bounds the registers. sm_86 has no more than 16.
  static constexpr int blocks(int size, bool vector) {
    const int most = (!vector ? 384 : size == 2 && kBits > 10 ? 1024 : 768) / kThreads;
    return most < 1 ? 1 : most > 16 ? 16 : most;
  }
  // In shared memory: the values, the signs of what comes in, those of what goes out.
  static constexpr uint32_t kIn = 4 * kSize, kOut = kIn + kSignBytes, kBytes = kOut + kSignBytes;

  // Where value j lies. 16 values in a row to a thread, or 16 in any column, are free of bank conflicts.
  FLATLORA_DEVICE static constexpr uint32_t place(uint32_t j) { return j ^ (j >> 5 & 3) << 2 ^ (j >> 8 & 1) << 4; }
  // Of value i of a thread that has every 2^kFirst-th; `base`: place of its value 0.
  template <int kFirst>
  FLATLORA_DEVICE static gpu::Shared at(gpu::Shared values, uint32_t base, int i) {
    const uint32_t mine = place(uint32_t(i) << kFirst);
    return values + 4 * ((base ^ (mine & 31)) + (mine & ~31u));
  }

  // Butterflies of the bits kBegin to kEnd - 1 of a thread's index.
  template <int kBegin, int kEnd>
  FLATLORA_DEVICE static void transform(float (&x)[16]) {
    FLATLORA_UNROLL
    for (int bit = kBegin; bit < kEnd; ++bit) {
      FLATLORA_UNROLL
      for (int i = 0; i < 16; ++i) {
        const int other = i | 1 << bit;
        if (other == i) continue;
        const float sum = x[i] + x[other], difference = x[i] - x[other];
        x[i] = sum;
        x[other] = difference;
      }
    }
  }
};

// 16 elements at `index` of a row, zeros outside of [0, length). kVector: they are there or not as a whole, contiguous
// and aligned to 16 bytes.
template <class T, bool kVector>
FLATLORA_DEVICE void load_16(float (&x)[16], const T* row, int64_t stride, int64_t index, int64_t length) {
  FLATLORA_UNROLL
  for (int i = 0; i < 16; ++i) x[i] = 0.0f;
  if constexpr (kVector) {
    if (index < 0 || index >= length) return;
    FLATLORA_UNROLL
    for (int v = 0; v < int(sizeof(T)); ++v) {
      const auto words = gpu::load_global<gpu::Words<4>>(row + index + v * (16 / int(sizeof(T))));
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4)
          x[4 * v + i] = as_float(words.v[i]);
        else
          unpack(T{}, words.v[i], x[8 * v + 2 * i], x[8 * v + 2 * i + 1]);
      }
    }
  } else {
    FLATLORA_UNROLL
    for (int i = 0; i < 16; ++i)
      if (index + i >= 0 && index + i < length) x[i] = number_at<T>(row, (index + i) * stride);
  }
}
// The same outwards, added to what is there where `add` says so.
template <class T, bool kVector>
FLATLORA_DEVICE void store_16(float (&x)[16], T* row, int64_t index, int64_t length, bool add) {
  if (add) {
    float y[16];
    load_16<T, kVector>(y, row, 1, index, length);
    FLATLORA_UNROLL
    for (int i = 0; i < 16; ++i) x[i] += y[i];
  }
  if constexpr (kVector) {
    if (index < 0 || index >= length) return;
    FLATLORA_UNROLL
    for (int v = 0; v < int(sizeof(T)); ++v) {
      gpu::Words<4> words;
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4)
          words.v[i] = as_int(x[4 * v + i]);
        else
          words.v[i] = pack(T{}, x[8 * v + 2 * i], x[8 * v + 2 * i + 1]);
      }
      gpu::store_global(row + index + v * (16 / int(sizeof(T))), words);
    }
  } else {
    FLATLORA_UNROLL
    for (int i = 0; i < 16; ++i)
      if (index + i >= 0 && index + i < length) store_number<T>(row, index + i, x[i]);
  }
}
// x times noise_scale of the 16 rows from `index`; of rows that do not exist, zeros stay.
template <class T, bool kVector>
FLATLORA_DEVICE void scale_16(float (&x)[16], const TransformArgs& args, const Draw& draw, int64_t index) {
  float scale[16];
  load_16<float, kVector>(scale, args.noise.scale, args.noise.scale_stride, index, args.N);
  FLATLORA_UNROLL
  for (int i = 0; i < 16; ++i) x[i] *= sign_factor<T>(draw, scale[i]);
}

// kVector: of load_16, for `a`, y and noise_scale.
template <class T, int kBits, bool kVector>
FLATLORA_KERNEL(Walsh<kBits>::kThreads, (Walsh<kBits>::blocks(sizeof(T), kVector)))
transform_kernel(TransformArgs args) {
  using W = Walsh<kBits>;
  const TransformBlock b(args, kBits);
  const gpu::Shared values = gpu::shared_base();
  const uint32_t me = uint32_t(gpu::thread());
  const uint32_t out = reversed(me, kBits - 4);  // of each 16 outputs those that end up here
  const uint32_t second = W::place(me / 16 * 256 + me % 16), third = W::place(me);
  const T* const row = static_cast<const T*>(args.a) + b.m * args.a_row_stride;
  const bool backward = args.input_grad != 0;
  float sum[16] = {};
  FLATLORA_NO_UNROLL
  for (uint32_t step = 0; step < b.tiles_count; ++step) {
    const uint32_t tile = b.tiles_begin + step;
    float x[16];
    const int64_t index = int64_t(tile) * W::kSize - b.in_first + 16 * me;
    load_16<T, kVector>(x, row, args.a_col_stride, index, b.in_length);
    if (backward) scale_16<T, kVector>(x, args, b.draw, index);
    // 128 signs a call, of what comes in and of what goes out.
    constexpr uint32_t kCalls = W::kSize / 128;
    if (me < 2 * kCalls) {
      const uint32_t call = me % kCalls;
      const bool going_out = me >= kCalls;
      const uint32_t first = (going_out ? b.tile : tile) << (kBits - 7);
      gpu::Words<4> words;
      philox_at(b.draw, (going_out ? b.out_kind : b.in_kind) + first + call, going_out ? tile : b.tile, words.v);
      gpu::store_shared(values + (going_out ? W::kOut : W::kIn) + 16 * call, words);
    }
    gpu::sync_threads();
    const uint32_t in_signs = gpu::load_shared<uint16_t>(values + W::kIn + 2 * me);
    const uint32_t out_signs = gpu::load_shared<uint16_t>(values + W::kOut + 2 * out);
    FLATLORA_UNROLL
    for (int i = 0; i < 16; ++i) x[i] = with_sign(x[i], in_signs, i);
    W::template transform<0, 4>(x);
    FLATLORA_UNROLL
    for (int i = 0; i < 16; i += 4)
      gpu::store_shared(values + 4 * W::place(16 * me + uint32_t(i)),
                        gpu::Words<4>{{as_int(x[i]), as_int(x[i + 1]), as_int(x[i + 2]), as_int(x[i + 3])}});
    gpu::sync_threads();
    FLATLORA_UNROLL
    for (int i = 0; i < 16; ++i) x[i] = gpu::load_shared<float>(W::template at<4>(values, second, i));
    W::template transform<0, 4>(x);
    FLATLORA_UNROLL
    for (int i = 0; i < 16; ++i) gpu::store_shared(W::template at<4>(values, second, i), x[i]);
    gpu::sync_threads();
    FLATLORA_UNROLL
    for (int i = 0; i < 16; ++i) x[i] = gpu::load_shared<float>(W::template at<kBits - 4>(values, third, i));
    W::template transform<12 - kBits, 4>(x);  // of the bits 8 and above
    // The thread's places are the highest bits, in reverse the lowest: 16 outputs in a row.
    FLATLORA_UNROLL
    for (int i = 0; i < 16; ++i) {
      const int mirrored = i >> 3 | (i >> 1 & 2) | (i << 1 & 4) | (i << 3 & 8);
      sum[mirrored] += with_sign(x[i], out_signs, mirrored);
    }
  }
  const int64_t index = int64_t(b.tile) * W::kSize - b.out_first + 16 * out;
  if (!backward) scale_16<T, kVector>(sum, args, b.draw, index);
  store_16<T, kVector>(sum, static_cast<T*>(args.y) + b.m * b.out_length, index, b.out_length, args.add != 0);
}

// --- Smaller tiles: a value a thread ---

constexpr int kSmallWalsh = 256;  // the largest

template <class T>
FLATLORA_KERNEL(kSmallWalsh, 2)
transform_small_kernel(TransformArgs args) {
  const int bits = int(args.noise.tile_bits);
  const TransformBlock b(args, bits);
  const gpu::Shared values = gpu::shared_base();
  const uint32_t me = uint32_t(gpu::thread()), mirrored = reversed(me, bits);
  const bool mine = me < 1u << bits, backward = args.input_grad != 0;
  const T* const row = static_cast<const T*>(args.a) + b.m * args.a_row_stride;
  const uint32_t out = (b.tile << bits) + mirrored;
  float sum = 0.0f;
  uint32_t buffer = 0;
  FLATLORA_NO_UNROLL
  for (uint32_t step = 0; step < b.tiles_count; ++step) {
    const uint32_t tile = b.tiles_begin + step, in = (tile << bits) + me;
    const int64_t index = (int64_t(tile) << bits) + me - b.in_first;
    float x = 0.0f;
    if (mine && index >= 0 && index < b.in_length) {
      x = with_sign(number_at<T>(row, index * args.a_col_stride), sign_word(b.draw, b.in_kind, in, b.tile) >> (in & 31),
                    0);
      if (backward)
        x *= sign_factor<T>(b.draw, gpu::load_global<float>(args.noise.scale + index * args.noise.scale_stride));
    }
    FLATLORA_NO_UNROLL
    for (int bit = 0; bit < bits; ++bit) {
      gpu::store_shared(values + 4 * (buffer + me), x);
      gpu::sync_threads();
      const float other = gpu::load_shared<float>(values + 4 * (buffer + (me ^ 1u << bit)));
      x = me >> bit & 1 ? other - x : x + other;
      buffer ^= kSmallWalsh;
    }
    sum += with_sign(x, sign_word(b.draw, b.out_kind, out, tile) >> (out & 31), 0);
  }
  const int64_t index = (int64_t(b.tile) << bits) + mirrored - b.out_first;
  if (!mine || index < 0 || index >= b.out_length) return;
  if (!backward)
    sum *= sign_factor<T>(b.draw, gpu::load_global<float>(args.noise.scale + index * args.noise.scale_stride));
  const int64_t at = b.m * b.out_length + index;
  store_number<T>(args.y, at, args.add ? number_at<T>(args.y, at) + sum : sum);
}

}  // namespace flatlora
