// The noise of docs/internals/noise.md in a CUDA thread. A thread draws for chunks: 8 consecutive columns of one row
// of the weight, which one gaussian call of the generator serves. All kernels draw here: all see the same bits.
#pragma once

#include <type_traits>

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
  uint32_t flip;                             // the same as what changes the signs of a pair of 16 bits

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
  d.flip = antithetic && (sample & 1) ? 0x80008000u : 0;
  return d;
}

// The generator's state is a product of rows and blocks for two rounds: what depends on one of them only.
struct RowKey {
  uint32_t high, low;
};
struct BlockKey {
  uint32_t k[4];
};

// `row`: the second word of the counter.
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

// The words of `n` calls, round by round, so that all share the keys' sums. `block(i)`: of call i.
template <int n, class Block>
FLATLORA_DEVICE void philox(const Draw& d, const RowKey (&rows)[n], Block block, uint32_t (&c)[n][4]) {
  FLATLORA_UNROLL
  for (int i = 0; i < n; ++i) {
    uint32_t high;
    mulhilo(kPhiloxM1, rows[i].high ^ block(i).k[0], high, c[i][1]);
    c[i][0] = high ^ block(i).k[1];
    c[i][2] = rows[i].low ^ block(i).k[2];
    c[i][3] = block(i).k[3];
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
// Of `n` rows and one block.
template <int n>
FLATLORA_DEVICE void philox(const Draw& d, const RowKey (&rows)[n], const BlockKey& block, uint32_t (&c)[n][4]) {
  philox(d, rows, [&block](int) -> const BlockKey& { return block; }, c);
}
// Of the counter (c0, c1, stream, sample).
FLATLORA_DEVICE void philox_at(const Draw& d, uint32_t c0, uint32_t c1, uint32_t (&words)[4]) {
  const RowKey row[1] = {row_key(d, c1)};
  uint32_t c[1][4];
  philox(d, row, block_key(d, c0 - d.first_block), c);
  FLATLORA_UNROLL
  for (int i = 0; i < 4; ++i) words[i] = c[0][i];
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

// Several at once, from the elements at place(j); 0 where that is negative. All loads are under way before the first is
// waited for, as they would not be beside the branches of float_at.
template <int n, class Place>
FLATLORA_DEVICE void floats_at(float (&x)[n], const void* data, int64_t dtype, Place place) {
  uint32_t bits[n];
  if (dtype == int64_t(DType::kFloat32)) {
    FLATLORA_UNROLL
    for (int j = 0; j < n; ++j)
      bits[j] = place(j) < 0 ? 0 : gpu::load_global<uint32_t>(static_cast<const uint32_t*>(data) + place(j));
  } else {
    FLATLORA_UNROLL
    for (int j = 0; j < n; ++j)
      bits[j] = place(j) < 0 ? 0 : gpu::load_global<uint16_t>(static_cast<const uint16_t*>(data) + place(j));
  }
  FLATLORA_UNROLL
  for (int j = 0; j < n; ++j) {
    const float half =
        dtype == int64_t(DType::kBFloat16) ? as_float(bits[j] << 16) : gpu::f16_to_float(uint16_t(bits[j]));
    x[j] = dtype == int64_t(DType::kFloat32) ? as_float(bits[j]) : half;
  }
}

FLATLORA_DEVICE uint32_t add_bf16(uint32_t a, uint32_t b) { return gpu::fma_bf16(a, 0x3f803f80u, b); }

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

// --- What a thread has at a time, and what multiplies the numbers drawn ---

// Four chunks: rows n to n + 3 of one block of columns. near_gaussian: rows n and n + 8 of two blocks, a unit.
template <Noise kind>
struct Patch {
  static constexpr bool kUnit = kind == Noise::kNearGaussian;
  static constexpr int kCols = kUnit ? 2 : 1, kRows = 4 / kCols;  // chunks
  // Of chunk i, from the first: rows and blocks.
  FLATLORA_DEVICE static constexpr int row(int i) { return kUnit ? i / 2 * 8 : i; }
  FLATLORA_DEVICE static constexpr int col(int i) { return kUnit ? i % 2 : 0; }
};

// float, and on bfloat16 weights a pair of bfloat16, but for gaussian.
template <Noise kind, class T>
inline constexpr bool kPairs = kind != Noise::kGaussian && std::is_same_v<T, gpu::bf16>;
template <Noise kind, class T>
using Factor = std::conditional_t<kPairs<kind, T>, uint32_t, float>;

FLATLORA_DEVICE float to_float(gpu::bf16, uint32_t pair) { return as_float(pair & 0xffff0000u); }

// x / sqrt(665) as an IEEE division rounds it: double holds enough of the reciprocal, and needs no subroutine.
FLATLORA_DEVICE float over_deviation(float x) {
  constexpr float kDeviation = 25.787593916455254f;
  return float(double(x) * (1.0 / double(kDeviation)));
}

// What multiplies the numbers drawn for a row, of near_gaussian m / 2, which keeps the largest finite. 0 for rows that
// do not exist.
template <Noise kind, class T>
FLATLORA_DEVICE Factor<kind, T> factor_of(const Draw& d, float noise_scale) {
  constexpr float kSqrt2Ln2 = 1.17741002f;  // R = sqrt(-2 ln U) = sqrt(2 ln 2) sqrt(-lg2 U)
  if constexpr (kind == Noise::kGaussian) {
    return noise_scale * (d.sign * kSqrt2Ln2);
  } else {
    constexpr bool kHalves = kind == Noise::kNearGaussian;
    const float f = kHalves ? over_deviation(noise_scale) : noise_scale;
    if constexpr (!kPairs<kind, T>)
      return f * (kHalves ? 2 * d.sign : d.sign);
    else if constexpr (kHalves)  // rounded first: twice a subnormal number may have a bit more
      return gpu::fma_bf16(gpu::pack_bf16(f, f), 0x40004000u ^ d.flip, 0x80008000u);
    else
      return gpu::pack_bf16(f, f) ^ d.flip;
  }
}

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
template <Noise kind, class T, bool kApart = false>
FLATLORA_DEVICE void add_signs(Chunk<T> (&w)[4], uint32_t word, const Factor<kind, T> (&factor)[4],
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
        const uint32_t signs = gpu::byte_permute(even_signs, odd_signs, 0x4000u + 0x1010u * i);
        if constexpr (kPairs<kind, T> && !kApart) {
          w[i].v[q] = add_bf16(w[i].v[q], gpu::xor_masked(factor[i], signs, 0x80008000u));
        } else {
          // z (z w + factor) = w + factor z, also after rounding: one instruction changes two signs.
          float f, even, odd;
          if constexpr (kPairs<kind, T>)
            f = to_float(T{}, factor[i]);
          else
            f = factor[i];
          unpack(T{}, gpu::xor_masked(w[i].v[q], signs, 0x80008000u), even, odd);
          const uint32_t rounded = pack(T{}, even + f, odd + f);
          w[i].v[q] = gpu::xor_masked(rounded, signs, 0x80008000u);
          if constexpr (kApart)
            rest[i].v[q] = gpu::xor_masked(rest_of<T>(rounded, even + f, odd + f), signs, 0x80008000u);
        }
      }
    }
  }
}

// m / 2 of the two columns of a word of each call, as pairs of bfloat16, in the order of Patch. Where masked, a pair is
// a number times 2^-128, and sums of four are exact. What brings them up to m / 2 is itself a bfloat16.
FLATLORA_DEVICE void near_gaussian_halves(uint32_t left, uint32_t right, uint32_t (&half)[4]) {
  constexpr uint32_t kMask = 0x81e081e0u, kUp = 0x7f007f00u, kDown = 0xff00ff00u;  // 2^127 and -2^127
  constexpr uint32_t kMinusOne = 0xbf80bf80u, kMinusTwo = 0xc000c000u, kMinusZero = 0x80008000u;
  const uint32_t a = left & kMask, b = gpu::rotate_right(left, 5) & kMask;
  const uint32_t c = right & kMask, d = gpu::rotate_right(right, 5) & kMask;
  const uint32_t sum[2] = {add_bf16(a, b), gpu::fma_bf16(b, kMinusOne, a)};
  const uint32_t c_up = gpu::fma_bf16(c, kUp, kMinusZero);
  const uint32_t up[2] = {gpu::fma_bf16(d, kUp, c_up), gpu::fma_bf16(d, kDown, c_up)};
  FLATLORA_UNROLL
  for (int row = 0; row < 2; ++row) {
    half[2 * row] = gpu::fma_bf16(sum[row], kUp, up[row]);
    half[2 * row + 1] = gpu::fma_bf16(up[row], kMinusTwo, half[2 * row]);
  }
}

// Word q of a chunk: w + factor (m / 2).
template <class T, bool kApart>
FLATLORA_DEVICE void add_halves(Chunk<T>& w, int q, uint32_t half, Factor<Noise::kNearGaussian, T> factor,
                                Chunk<T>* rest) {
  if constexpr (kPairs<Noise::kNearGaussian, T> && !kApart) {
    w.v[q] = gpu::fma_bf16(half, factor, w.v[q]);
  } else {
    float f, even_half, odd_half;
    if constexpr (kPairs<Noise::kNearGaussian, T>)
      f = to_float(T{}, factor);
    else
      f = factor;
    unpack(gpu::bf16{}, half, even_half, odd_half);
    if constexpr (sizeof(T) == 4) {
      w.v[2 * q] = as_int(fmaf(even_half, f, as_float(w.v[2 * q])));
      w.v[2 * q + 1] = as_int(fmaf(odd_half, f, as_float(w.v[2 * q + 1])));
    } else {
      float even, odd;
      unpack(T{}, w.v[q], even, odd);
      even = fmaf(even_half, f, even);
      odd = fmaf(odd_half, f, odd);
      w.v[q] = pack(T{}, even, odd);
      if constexpr (kApart) rest->v[q] = rest_of<T>(w.v[q], even, odd);
    }
  }
}

// --- Walsh tiles ---

// The first words of hadamard's counters, without index / 128: for the signs of rows and of columns.
constexpr uint32_t kRowSigns = 0x80000000u, kColumnSigns = 0xC0000000u;

// The low `bits` of x in reverse.
FLATLORA_DEVICE uint32_t reversed(uint32_t x, int bits) { return gpu::reverse_bits(x) >> 1 >> (31 - bits); }

FLATLORA_DEVICE uint32_t word_of(const uint32_t (&words)[4], uint32_t index) {
  const uint32_t a = index & 1 ? words[1] : words[0], b = index & 1 ? words[3] : words[2];
  return index & 2 ? b : a;
}
// The word that has the sign of row or column x, in tile `tile` of the other.
FLATLORA_DEVICE uint32_t sign_word(const Draw& d, uint32_t kind, uint32_t x, uint32_t tile) {
  uint32_t words[4];
  philox_at(d, kind + (x >> 7), tile, words);
  return word_of(words, x >> 5);
}
// Bit j: whether the Walsh function `mirrored`, a reversed row, is negative at column j of a chunk, but for what the
// column of the chunk itself adds.
FLATLORA_DEVICE uint32_t walsh_byte(uint32_t mirrored) {
  return (mirrored & 1 ? 0xaau : 0u) ^ (mirrored & 2 ? 0xccu : 0u) ^ (mirrored & 4 ? 0xf0u : 0u);
}

// Four rows that begin at a multiple of 4, where tiles have 8 columns or more.
struct WalshRows {
  uint32_t mirrored[4], bytes;  // and walsh_byte of each
  uint32_t row, tile, signs;    // of the tile of columns seen last: the word of the rows
};
FLATLORA_DEVICE WalshRows walsh_rows(const Draw& d, uint32_t row, int bits, uint32_t k) {
  WalshRows rows;
  rows.row = row;
  rows.bytes = 0;
  FLATLORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    rows.mirrored[i] = reversed(row + uint32_t(i), bits);
    rows.bytes |= walsh_byte(rows.mirrored[i]) << 8 * i;
  }
  rows.tile = k >> bits;
  rows.signs = sign_word(d, kRowSigns, row, rows.tile);
  return rows;
}
// The signs of a chunk in each row, by bytes; k: its column in the whole weight.
FLATLORA_DEVICE uint32_t walsh_signs(const Draw& d, WalshRows& rows, int bits, uint32_t k) {
  if (k >> bits != rows.tile) {
    rows.tile = k >> bits;
    rows.signs = sign_word(d, kRowSigns, rows.row, rows.tile);
  }
  const uint32_t columns = sign_word(d, kColumnSigns, k, rows.row >> bits) >> (k & 24) & 0xff;
  uint32_t odd = 0;
  FLATLORA_UNROLL
  for (int i = 0; i < 4; ++i)
    odd |= (uint32_t(gpu::count_bits(rows.mirrored[i] & k)) ^ rows.signs >> ((rows.row & 31) + i)) % 2 << 8 * i;
  return columns * 0x01010101u ^ rows.bytes ^ odd * 0xff;
}
// The same of one row, for all tiles.
FLATLORA_DEVICE uint32_t walsh_signs(const Draw& d, uint32_t row, int bits, uint32_t k) {
  const uint32_t mirrored = reversed(row, bits), width = bits < 3 ? 1u << bits : 8u;
  uint32_t signs = sign_word(d, kColumnSigns, k, row >> bits) >> (k & 24) ^ walsh_byte(mirrored);
  FLATLORA_NO_UNROLL
  for (uint32_t j = 0; j < 8; j += width) {
    const uint32_t odd =
        uint32_t(gpu::count_bits(mirrored & k)) ^ sign_word(d, kRowSigns, row, (k + j) >> bits) >> (row & 31);
    signs ^= (odd & 1 ? (1u << width) - 1 : 0u) << j;
  }
  return signs & 0xff;
}

// --- The noise of a patch ---

// Whether a weight begins at a row and a column where perturb_patch needs no kAny.
FLATLORA_INLINE bool begins_whole(const NoiseArgs& noise) {
  const Noise kind = static_cast<Noise>(noise.kind);
  if (kind == Noise::kRademacher) return noise.row_offset % 4 == 0;
  return kind != Noise::kNearGaussian || (noise.row_offset % 16 == 0 && noise.col_offset % 16 == 0);
}

// As one thread holds its rows.
template <Noise kind, class T>
struct PatchRows {
  RowKey key[kind == Noise::kGaussian ? 4 : 1];
  Factor<kind, T> factor[4];  // by chunk
  uint32_t row;               // the first, of the whole weight
};
template <Noise kind>
struct PatchBlocks {
  BlockKey key[Patch<kind>::kCols];
  uint32_t first;  // of the tensor
};

template <Noise kind, class T>
FLATLORA_DEVICE void set_rows(PatchRows<kind, T>& rows, const Draw& d, uint32_t n) {
  rows.row = d.first_row + n;
  if constexpr (kind == Noise::kGaussian) {
    FLATLORA_UNROLL
    for (int i = 0; i < 4; ++i) rows.key[i] = row_key(d, rows.row + i);
  } else if constexpr (kind == Noise::kNearGaussian) {
    rows.key[0] = row_key(d, rows.row - (rows.row >> 4) * 8);  // n & 8 is 0
  } else {
    rows.key[0] = row_key(d, rows.row >> 4);
  }
}
template <Noise kind>
FLATLORA_DEVICE PatchBlocks<kind> set_blocks(const Draw& d, uint32_t block) {
  PatchBlocks<kind> blocks;
  FLATLORA_UNROLL
  for (int i = 0; i < Patch<kind>::kCols; ++i) blocks.key[i] = block_key(d, block + uint32_t(i));
  blocks.first = block;
  return blocks;
}

// A chunk of near_gaussian by itself, at any row and block.
template <class T, bool kApart>
FLATLORA_DEVICE void add_near_gaussian_chunk(Chunk<T>& w, const Draw& d, uint32_t row, uint32_t block,
                                             Factor<Noise::kNearGaussian, T> factor, Chunk<T>* rest) {
  const uint32_t global = d.first_block + block, of_row = (row >> 4) * 8 + (row & 7);
  uint32_t left[4], right[4];
  philox_at(d, global & ~1u, of_row, left);
  philox_at(d, global | 1u, of_row, right);
  FLATLORA_UNROLL
  for (int q = 0; q < 4; ++q) {
    uint32_t half[4];
    near_gaussian_halves(left[q], right[q], half);
    const uint32_t even = row & 8 ? half[2] : half[0], odd = row & 8 ? half[3] : half[1];
    add_halves<T, kApart>(w, q, global & 1 ? odd : even, factor, rest);
  }
}

// W becomes W + eps in a patch. kAny: of any first row and block, which costs a second call for rademacher and six more
// for near_gaussian; else the first row is a multiple of 4, or n & 8 is 0 and the first block is even. kApart as above,
// `rest` of four chunks.
template <Noise kind, class T, bool kAny = false, bool kApart = false>
FLATLORA_DEVICE void perturb_patch(Chunk<T> (&w)[4], const Draw& d, const PatchRows<kind, T>& rows,
                                   const PatchBlocks<kind>& blocks, Chunk<T>* rest = nullptr) {
  if constexpr (kind == Noise::kGaussian) {
    uint32_t words[4][4];
    philox(d, rows.key, blocks.key[0], words);
    FLATLORA_UNROLL
    for (int i = 0; i < 4; ++i) add_gaussian<T, kApart>(w[i], words[i], rows.factor[i], kApart ? rest + i : nullptr);
  } else if constexpr (kind == Noise::kNearGaussian) {
    if constexpr (kAny) {
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i)
        add_near_gaussian_chunk<T, kApart>(w[i], d, rows.row + uint32_t(Patch<kind>::row(i)),
                                           blocks.first + uint32_t(Patch<kind>::col(i)), rows.factor[i],
                                           kApart ? rest + i : nullptr);
    } else {
      const RowKey key[2] = {rows.key[0], rows.key[0]};
      uint32_t words[2][4];
      philox(d, key, [&blocks](int i) -> const BlockKey& { return blocks.key[i]; }, words);
      FLATLORA_UNROLL
      for (int q = 0; q < 4; ++q) {
        uint32_t half[4];
        near_gaussian_halves(words[0][q], words[1][q], half);
        FLATLORA_UNROLL
        for (int i = 0; i < 4; ++i)
          add_halves<T, kApart>(w[i], q, half[i], rows.factor[i], kApart ? rest + i : nullptr);
      }
    }
  } else {
    uint32_t words[1][4];
    philox(d, rows.key, blocks.key[0], words);
    uint32_t word = rademacher_word(words[0], rows.row);
    if constexpr (kAny) {
      const uint32_t next = rows.row + 4;
      const RowKey next_key[1] = {row_key(d, next >> 4)};
      philox(d, next_key, blocks.key[0], words);
      word = gpu::byte_permute(word, rademacher_word(words[0], next), 0x3210u + 0x1111u * (rows.row & 3));
    }
    add_signs<kind, T, kApart>(w, word, rows.factor, rest);
  }
}

}  // namespace flatlora
