// The noise of docs/internals/noise.md in a CUDA thread. A thread draws for chunks: 8 consecutive columns of one row
// of the weight, which one gaussian call of the generator serves. All kernels draw here: all see the same bits.
#pragma once

#include "../common/args.h"
#include "device.h"

namespace flatlora {

// 8 elements of type T as they lie in memory.
template <class T>
using Chunk = gpu::Words<2 * sizeof(T)>;

// What the whole thread shares. Rows and columns given to the functions below are those of the tensor `weight`.
struct Draw {
  uint32_t key0, key1;
  uint32_t row_key, block_key0, block_key1;  // of the first rounds, with stream and sample
  uint32_t first_row, first_block;           // of the tensor in the whole weight; a block is 8 columns
  float sign;                                // -1 in the second of an antithetic pair

  FLATLORA_DEVICE uint32_t round_key0(int round) const { return key0 + uint32_t(round) * kPhiloxW0; }
  FLATLORA_DEVICE uint32_t round_key1(int round) const { return key1 + uint32_t(round) * kPhiloxW1; }
};

// For the rows of x that belong to sample `group` of the call.
FLATLORA_DEVICE Draw draw_of(const NoiseArgs& noise, int64_t group) {
  const gpu::Words<2> seed = gpu::load_global<gpu::Words<2>>(noise.seed);
  const uint32_t sample = uint32_t(noise.sample_offset) + uint32_t(group);
  const bool antithetic = noise.antithetic != 0;
  Draw d;
  d.key0 = uint32_t(gpu::uniform(int(seed.v[0])));
  d.key1 = uint32_t(gpu::uniform(int(seed.v[1])));
  uint32_t high, low;
  mulhilo(kPhiloxM1, uint32_t(noise.stream), high, low);
  d.row_key = high ^ d.round_key0(0);
  d.block_key0 = (antithetic ? sample >> 1 : sample) ^ d.round_key1(0);
  d.block_key1 = low ^ d.round_key0(1);
  d.first_row = uint32_t(noise.row_offset);
  d.first_block = uint32_t(noise.col_offset >> 3);
  d.sign = antithetic && (sample & 1) ? -1.0f : 1.0f;
  return d;
}

// What multiplies the deviates of a row, given noise_scale: `scale_of` of a row that does not exist is 0.
template <Noise kind>
FLATLORA_DEVICE float factor_of(const Draw& d, float noise_scale) {
  constexpr float kSqrt2Ln2 = 1.17741002f;  // R = sqrt(-2 ln U) = sqrt(2 ln 2) sqrt(-lg2 U)
  return noise_scale * (kind == Noise::kGaussian ? d.sign * kSqrt2Ln2 : d.sign);
}

// The generator's state is a product of rows and blocks for two rounds: what depends on one of them only.
struct RowKey {
  uint32_t high, low;
};
struct BlockKey {
  uint32_t k[4];
};

// `row`: n for gaussian, n / 16 for rademacher, of the whole weight.
FLATLORA_DEVICE RowKey row_key(const Draw& d, uint32_t row) {
  RowKey r;
  mulhilo(kPhiloxM0, row ^ d.row_key, r.high, r.low);
  return r;
}
FLATLORA_DEVICE BlockKey block_key(const Draw& d, uint32_t block) {
  BlockKey b;
  uint32_t high, low;
  mulhilo(kPhiloxM0, d.first_block + block, high, low);
  b.k[0] = low ^ d.round_key1(1);
  mulhilo(kPhiloxM1, high ^ d.block_key0, high, low);
  b.k[1] = low ^ d.round_key0(2);
  mulhilo(kPhiloxM0, high ^ d.block_key1, high, low);
  b.k[2] = high ^ d.round_key1(2);
  b.k[3] = low;
  return b;
}

// The words of `n` rows and one block, round by round, so that all share the keys' sums.
template <int n>
FLATLORA_DEVICE void philox(const Draw& d, const RowKey (&rows)[n], const BlockKey& block, uint32_t (&c)[n][4]) {
  FLATLORA_UNROLL
  for (int i = 0; i < n; ++i) {
    uint32_t high;
    mulhilo(kPhiloxM1, rows[i].high ^ block.k[0], high, c[i][1]);
    c[i][0] = high ^ block.k[1];
    c[i][2] = rows[i].low ^ block.k[2];
    c[i][3] = block.k[3];
  }
  FLATLORA_UNROLL
  for (int round = 3; round < 10; ++round) {
    const uint32_t key0 = d.round_key0(round), key1 = d.round_key1(round);
    FLATLORA_UNROLL
    for (int i = 0; i < n; ++i) {
      uint32_t high0, low0, high1, low1;
      mulhilo(kPhiloxM0, c[i][0], high0, low0);
      mulhilo(kPhiloxM1, c[i][2], high1, low1);
      c[i][0] = high1 ^ c[i][1] ^ key0;
      c[i][1] = low1;
      c[i][2] = high0 ^ c[i][3] ^ key1;
      c[i][3] = low0;
    }
  }
}

// --- Types ---

FLATLORA_DEVICE float to_float(float x) { return x; }
FLATLORA_DEVICE float to_float(gpu::bf16 x) { return as_float(uint32_t(x.bits) << 16); }
FLATLORA_DEVICE float to_float(gpu::f16 x) { return gpu::f16_to_float(x.bits); }

// `index` elements into `data`.
FLATLORA_DEVICE float float_at(const void* data, int64_t dtype, int64_t index) {
  if (dtype == int64_t(DType::kFloat32)) return gpu::load_global<float>(static_cast<const float*>(data) + index);
  const uint16_t bits = gpu::load_global<uint16_t>(static_cast<const uint16_t*>(data) + index);
  return dtype == int64_t(DType::kBFloat16) ? to_float(gpu::bf16{bits}) : to_float(gpu::f16{bits});
}

// The two elements of a word.
FLATLORA_DEVICE void unpack(gpu::bf16, uint32_t word, float& low, float& high) {
  low = as_float(word << 16);
  high = as_float(word & 0xffff0000u);
}
FLATLORA_DEVICE void unpack(gpu::f16, uint32_t word, float& low, float& high) {
  low = gpu::f16_to_float(uint16_t(word));
  high = gpu::f16_to_float(uint16_t(word >> 16));
}
FLATLORA_DEVICE uint32_t pack(gpu::bf16, float low, float high) { return gpu::pack_bf16(low, high); }
FLATLORA_DEVICE uint32_t pack(gpu::f16, float low, float high) { return gpu::pack_f16(low, high); }

// --- W + eps, rounded once ---

// Columns 2 q and 2 q + 1 of a chunk from word q of their call: w + factor z.
FLATLORA_DEVICE void add_gaussian_pair(uint32_t word, float factor, float& even, float& odd) {
  // Bytes 4b00 above 16 bits are the float 2^23 + those bits; the multiply-add takes the 2^23 off, exactly for U and
  // with one rounding for theta.
  const float u = as_float(gpu::byte_permute(word, 0x4b00u, 0x5410u));
  const float v = as_float(gpu::byte_permute(word, 0x4b00u, 0x5432u));
  const float uniform = fmaf(u, 0x1p-16f, -0x1.fffffep+6f);       // (u + 0.5) / 2^16
  const float theta = fmaf(v, 0x1.921fb6p-14f, -0x1.921fb6p+9f);  // 2 pi v / 2^16
  const float radius = gpu::sqrt_approx(-gpu::log2_approx(uniform)) * factor;
  even = fmaf(radius, gpu::cos_approx(theta), even);
  odd = fmaf(radius, gpu::sin_approx(theta), odd);
}

// What rounding left of two numbers, rounded as well.
template <class T>
FLATLORA_DEVICE uint32_t rest_of(uint32_t rounded, float low, float high) {
  float rounded_low, rounded_high;
  unpack(T{}, rounded, rounded_low, rounded_high);
  return pack(T{}, low - rounded_low, high - rounded_high);
}

// The chunk of a row whose call gave `words`. kApart: and in `rest` what rounding leaves.
template <class T, bool kApart = false>
FLATLORA_DEVICE void add_gaussian(Chunk<T>& w, const uint32_t (&words)[4], float factor, Chunk<T>* rest = nullptr) {
  FLATLORA_UNROLL
  for (int q = 0; q < 4; ++q) {
    float even, odd;
    if constexpr (sizeof(T) == 4) {
      even = as_float(w.v[2 * q]);
      odd = as_float(w.v[2 * q + 1]);
    } else {
      unpack(T{}, w.v[q], even, odd);
    }
    add_gaussian_pair(words[q], factor, even, odd);
    if constexpr (sizeof(T) == 4) {
      w.v[2 * q] = as_int(even);
      w.v[2 * q + 1] = as_int(odd);
    } else {
      w.v[q] = pack(T{}, even, odd);
      if constexpr (kApart) rest->v[q] = rest_of<T>(w.v[q], even, odd);
    }
  }
}

// The word of the rows from `row`, a multiple of 4 in the whole weight, to row + 3.
FLATLORA_DEVICE uint32_t rademacher_word(const uint32_t (&words)[4], uint32_t row) {
  const uint32_t a = row & 4 ? words[1] : words[0], b = row & 4 ? words[3] : words[2];
  return row & 8 ? b : a;
}

// The chunks of four rows that share `word`; kApart as above.
template <class T, bool kApart = false>
FLATLORA_DEVICE void add_rademacher(Chunk<T> (&w)[4], uint32_t word, const float (&factor)[4],
                                    Chunk<T>* rest = nullptr) {
  FLATLORA_UNROLL
  for (int q = 0; q < 4; ++q) {
    // The bits of row i, columns 2 q and 2 q + 1, at the top of byte i.
    const uint32_t even_signs = word << (7 - 2 * q), odd_signs = word << (6 - 2 * q);
    FLATLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        const float even = as_float(gpu::xor_masked(as_int(factor[i]), even_signs << (24 - 8 * i), 0x80000000u));
        const float odd = as_float(gpu::xor_masked(as_int(factor[i]), odd_signs << (24 - 8 * i), 0x80000000u));
        w[i].v[2 * q] = as_int(as_float(w[i].v[2 * q]) + even);
        w[i].v[2 * q + 1] = as_int(as_float(w[i].v[2 * q + 1]) + odd);
      } else {
        // z (z w + factor) = w + factor z, also after rounding: one instruction changes two signs.
        const uint32_t signs = gpu::byte_permute(even_signs, odd_signs, 0x4000u + 0x1010u * i);
        float even, odd;
        unpack(T{}, gpu::xor_masked(w[i].v[q], signs, 0x80008000u), even, odd);
        const uint32_t rounded = pack(T{}, even + factor[i], odd + factor[i]);
        w[i].v[q] = gpu::xor_masked(rounded, signs, 0x80008000u);
        if constexpr (kApart)
          rest[i].v[q] = gpu::xor_masked(rest_of<T>(rounded, even + factor[i], odd + factor[i]), signs, 0x80008000u);
      }
    }
  }
}

// Rows n to n + 3 of the tensor, as one thread holds them.
struct Quad {
  RowKey key[4];  // rademacher has one
  float factor[4];
  uint32_t row;  // of the whole weight
};

template <Noise kind>
FLATLORA_DEVICE void set_rows(Quad& quad, const Draw& d, uint32_t n) {
  quad.row = d.first_row + n;
  FLATLORA_UNROLL
  for (int i = 0; i < (kind == Noise::kGaussian ? 4 : 1); ++i)
    quad.key[i] = row_key(d, kind == Noise::kGaussian ? quad.row + i : quad.row >> 4);
}

// Columns 8 block to 8 block + 7 of the quad: W becomes W + eps. Rademacher: first_row + n is a multiple of 4, or
// kAnyRow, which costs a second call. kApart as above, `rest` of four chunks.
template <Noise kind, class T, bool kAnyRow = false, bool kApart = false>
FLATLORA_DEVICE void perturb_quad(Chunk<T> (&w)[4], const Draw& d, const Quad& quad, const BlockKey& block,
                                  Chunk<T>* rest = nullptr) {
  if constexpr (kind == Noise::kGaussian) {
    uint32_t words[4][4];
    philox(d, quad.key, block, words);
    FLATLORA_UNROLL
    for (int i = 0; i < 4; ++i) add_gaussian<T, kApart>(w[i], words[i], quad.factor[i], kApart ? rest + i : nullptr);
  } else {
    const RowKey key[1] = {quad.key[0]};
    uint32_t words[1][4];
    philox(d, key, block, words);
    uint32_t word = rademacher_word(words[0], quad.row);
    if constexpr (kAnyRow) {
      const uint32_t next = quad.row + 4;
      const RowKey next_key[1] = {row_key(d, next >> 4)};
      philox(d, next_key, block, words);
      word = gpu::byte_permute(word, rademacher_word(words[0], next), 0x3210u + 0x1111u * (quad.row & 3));
    }
    add_rademacher<T, kApart>(w, word, quad.factor, rest);
  }
}

}  // namespace flatlora
