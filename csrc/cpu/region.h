// What is drawn of a region of the noise before its tiles are made: of every kind but gaussian, whose calls of Philox
// cover a row, one call serves many rows.
#pragma once

#include "args.h"
#include "simd.h"

namespace flatlora {
namespace FLATLORA_ISA {

constexpr int W = kWidth;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The noise of one row group, as a weight of one type sees it.
struct Draw {
  Noise kind;
  PhiloxKey key;
  uint32_t stream, sample;
  float sign;
  uint32_t row_offset, col_offset;
  const float* scale;
  int64_t scale_stride;
  int tile_bits;
  bool round_factor;  // to bfloat16

  // What multiplies the numbers drawn for row n, which counts from the shard's first.
  float factor(int64_t n) const {
    float f = scale[n * scale_stride];
    if (kind == Noise::kNearGaussian) f /= kNearGaussianDeviation;
    if (round_factor) {
      bfloat16 rounded;
      from_float(f, rounded);
      f = to_float(rounded);
    }
    return sign * f;
  }
};

inline Draw make_draw(const NoiseArgs& noise, int64_t group, int64_t dtype) {
  const Noise kind = Noise(noise.kind);
  const int64_t sample = noise.sample_offset + group;
  return {kind,
          PhiloxKey(kind != Noise::kNone ? uint64_t(*noise.seed) : 0),
          uint32_t(noise.stream),
          uint32_t(noise.antithetic ? sample >> 1 : sample),
          noise.antithetic && (sample & 1) ? -1.0f : 1.0f,
          uint32_t(noise.row_offset),
          uint32_t(noise.col_offset),
          noise.scale,
          noise.scale_stride,
          int(noise.tile_bits),
          kind != Noise::kGaussian && DType(dtype) == DType::kBFloat16};
}

// Of signs a region holds a bit per value, 8 columns to a byte, 1 = negative; of near_gaussian an integer per value, in
// units of 16 columns and kUnitRows rows that are drawn whole. It has at most kRegionLong rows x kRegionShort columns,
// or the other way round, or kRegionArea values in the rows of one unit.
constexpr int64_t kRegionLong = 256, kRegionShort = 64, kRegionArea = kRegionLong * kRegionShort, kUnitRows = 2 * W;
struct Region {
  // A load of a tile's columns, or of 32 bits of signs, may begin at the last byte.
  uint8_t bytes[(kRegionShort + 32) * (kRegionLong + 16) + 16];
  uint32_t first_row, first_col;  // global
  uint32_t stride;                // bytes from row to row

  uint32_t row(uint32_t n) const { return (n - first_row) * stride; }
  // Of columns of the shard from k on: bytes from a row's first.
  uint32_t col(const Draw& d, int64_t k) const {
    return (d.col_offset + uint32_t(k) - first_col) >> (d.kind == Noise::kNearGaussian ? 0 : 3);
  }
  const uint8_t* at(const Draw& d, int64_t n, int64_t k) const {
    return bytes + row(d.row_offset + uint32_t(n)) + col(d, k);
  }
};

// Calls of Philox side by side: their rounds interleave, where one alone would wait for its multiplies.
template <int kCalls>
struct Beside {
  Words call[kCalls];
};
template <int kCalls>
SIMD void mulhilo(uint32_t m, const Beside<kCalls>& x, Beside<kCalls>& hi, Beside<kCalls>& lo) {
  for (int i = 0; i < kCalls; ++i) mulhilo(m, x.call[i], hi.call[i], lo.call[i]);
}
template <int kCalls>
SIMD Beside<kCalls> xor3(const Beside<kCalls>& x, const Beside<kCalls>& y, uint32_t key) {
  Beside<kCalls> result;
  for (int i = 0; i < kCalls; ++i) result.call[i] = xor3(x.call[i], y.call[i], key);
  return result;
}
// Of counters that differ in c1 within a call, and in c0, by one, from call to call.
template <int kCalls>
SIMD void philox_beside(uint32_t c0, const Words& c1, const Draw& d, Beside<kCalls> (&c)[4]) {
  for (int i = 0; i < kCalls; ++i) {
    Words begun[4];
    philox_rows_begin(c0 + uint32_t(i), c1, d.stream, d.sample, d.key, begun);
    for (int q = 0; q < 4; ++q) c[q].call[i] = begun[q];
  }
  philox_rounds(c, d.key, 3);
}

// One call of Philox covers 16 rows of a block of 8 columns: lanes lie across blocks.
inline void draw_rademacher(const Draw& d, uint32_t n0, uint32_t rows, uint32_t k0, uint32_t cols, Region& out) {
  const uint32_t first_block = k0 >> 3, blocks = uint32_t(ceil_div(cols, 8)), first_group = n0 >> 4;
  const uint32_t groups = ((n0 + rows - 1) >> 4) - first_group + 1;
  out.first_row = first_group << 4;
  out.first_col = k0;
  out.stride = uint32_t(ceil_div(blocks, W)) * W;
  for (uint32_t g = 0; g < groups; ++g)
    for (uint32_t b = 0; b < blocks; b += W) {
      const I block = add(iota(), splat(I(), first_block + b));
      Words c[4] = {split(block), splat(Words(), first_group + g), splat(Words(), d.stream), splat(Words(), d.sample)};
      philox_rounds(c, d.key);
      for (int q = 0; q < 4; ++q) store_bytes(out.bytes + (g * 16 + 4 * q) * out.stride + b, out.stride, join(c[q]));
    }
}

// The levels of two words, h = 0 and 1 of both, as bytes: columns 0, 2, 1, 3 of four. `again`: of the words rotated
// right by 5, whose signs lie in the other half.
template <bool kAgain>
SIMD I levels(I even, I odd) {
  static const int8_t table[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28};
  const I low = splat(I(), 0x000f000f), high = splat(I(), 0x0f000f00);
  const I even_codes = bit_and(kAgain ? shift_right<10>(even) : shift_right<5>(even), low);
  const I codes = and_or(kAgain ? shift_right<2>(odd) : shift_left<3>(odd), high, even_codes);
  const I low_sign = splat(I(), 0x00800080), high_sign = splat(I(), 0x80008000);
  I signs;
  if (kAgain) {
    signs = swap_halves(and_or(shift_left<11>(odd), high_sign, bit_and(shift_left<3>(even), low_sign)));
  } else {
    signs = and_or(odd, high_sign, bit_and(shift_right<8>(even), low_sign));
  }
  return negate_bytes(look_up(table, codes), signs);
}

// Lanes lie along the first 8 rows of each 16 of a unit.
inline void draw_near_gaussian(const Draw& d, uint32_t n0, uint32_t rows, uint32_t k0, uint32_t cols, Region& out) {
  out.first_row = n0 & ~15u;
  out.first_col = k0 & ~15u;
  out.stride = uint32_t(ceil_div(cols + (k0 & 15), 16)) * 16;
  const int64_t stride = out.stride;
  for (uint32_t r = 0; r < rows + (n0 & 15); r += kUnitRows) {
    const Words counters = split(add(iota(), splat(I(), (out.first_row + r) >> 1)));
    uint8_t* p = out.bytes + r * stride;
    for (uint32_t k = 0; k < out.stride; k += 16) {
      I first[4], second[4];  // of four columns a + b and a - b, or of the right call c + d and c - d
      Beside<2> c[4];
      philox_beside((out.first_col + k) >> 3, counters, d, c);
      for (int side = 0; side < 2; ++side)
        for (int i = 0; i < 2; ++i) {
          const I even = join(c[2 * i].call[side]), odd = join(c[2 * i + 1].call[side]);
          const I x = levels<false>(even, odd), y = levels<true>(even, odd);
          first[2 * side + i] = add_bytes(x, y);
          second[2 * side + i] = sub_bytes(x, y);
        }
      const auto store = [&](uint8_t* rows_of, const I(&m)[4]) {
        store_rows(rows_of + k, stride, 16, add_bytes(m[0], m[2]), add_bytes(m[1], m[3]), sub_bytes(m[0], m[2]),
                   sub_bytes(m[1], m[3]));
      };
      store(p, first);
      store(p + 8 * stride, second);
    }
  }
}

// Signs of hadamard's rows or columns (`which` is the first counter's offset) from `begin`, in the tile `tile` of the
// other index: bit i of `out` is that of (begin & ~127) + i. Spans of 128, W at a time.
inline void draw_tile_signs(const Draw& d, uint32_t which, uint32_t begin, int64_t count, uint32_t tile,
                            uint32_t* out) {
  const uint32_t first = begin >> 7;
  const int64_t spans = ((begin & 127) + count + 127) >> 7;
  for (int64_t s = 0; s < spans; s += W) {
    Words c[4] = {split(add(iota(), splat(I(), which + first + uint32_t(s)))), splat(Words(), tile),
                  splat(Words(), d.stream), splat(Words(), d.sample)};
    philox_rounds(c, d.key);
    uint32_t words[4][W];
    for (int q = 0; q < 4; ++q) store_words(words[q], join(c[q]));
    for (int64_t i = 0; i < min64(W, spans - s); ++i)
      for (int q = 0; q < 4; ++q) out[4 * (s + i) + q] = words[q][i];
  }
}

SIMD uint32_t bit_of(const uint32_t* bits, uint32_t i) { return bits[i >> 5] >> (i & 31) & 1; }

// 64 columns of the first 64 rows: a bit per value, 1 = negative.
struct Walsh {
  uint64_t rows[64];
  constexpr Walsh() : rows() {
    for (uint32_t i = 0; i < 64; ++i)
      for (uint32_t j = 0; j < 64; ++j) rows[i] |= uint64_t(parity(i & j)) << j;
  }
};
constexpr Walsh kWalsh;

// The part of a tile that lies in the region: rows and columns are global, [n0, n1) and [k0, k1).
inline void draw_hadamard_tile(const Draw& d, uint64_t n0, uint64_t n1, uint64_t k0, uint64_t k1, Region& out) {
  constexpr int kMostWords = 4 * (kRegionArea / kUnitRows / 128 + 1);
  uint32_t row_signs[kMostWords], col_signs[kMostWords];
  const int t = d.tile_bits;
  draw_tile_signs(d, kHadamardRows, uint32_t(n0), int64_t(n1 - n0), uint32_t(k0 >> t), row_signs);
  draw_tile_signs(d, kHadamardCols, uint32_t(k0), int64_t(k1 - k0), uint32_t(n0 >> t), col_signs);
  const uint32_t first_n = uint32_t(n0) & ~127u, first_k = uint32_t(k0) & ~127u, tile = (1u << t) - 1;
  for (uint64_t n = n0; n < n1; ++n) {
    const uint32_t reversed = reverse_bits(uint32_t(n) & tile, t), row_sign = bit_of(row_signs, uint32_t(n) - first_n);
    uint8_t* bytes = out.bytes + out.row(uint32_t(n));
    if (t >= 6) {
      const uint64_t row = kWalsh.rows[reversed & 63] ^ (0 - uint64_t(row_sign));
      for (uint64_t k = k0 & ~uint64_t(63); k < k1; k += 64) {
        uint64_t word;
        memcpy(&word, col_signs + (uint32_t(k) - first_k) / 32, 8);
        word ^= row ^ (0 - uint64_t(__builtin_parity(reversed & uint32_t(k))));
        memcpy(bytes + (uint32_t(k) - out.first_col) / 8, &word, 8);
      }
    } else {
      for (uint64_t k = k0; k < k1; ++k) {
        const uint32_t at = uint32_t(k) - out.first_col, col_sign = bit_of(col_signs, uint32_t(k) - first_k);
        bytes[at >> 3] = uint8_t(bytes[at >> 3] | (parity(reversed & uint32_t(k)) ^ row_sign ^ col_sign) << (at & 7));
      }
    }
  }
}

inline void draw_hadamard(const Draw& d, uint32_t n0, uint32_t rows, uint32_t k0, uint32_t cols, Region& out) {
  const uint64_t n1 = uint64_t(n0) + rows, k1 = uint64_t(k0) + cols, side = uint64_t(1) << d.tile_bits;
  const auto next = [&](uint64_t i, uint64_t end) {
    const uint64_t tile_end = (i / side + 1) * side;
    return tile_end < end ? tile_end : end;
  };
  out.first_row = n0;
  out.first_col = k0 & ~63u;
  out.stride = uint32_t(ceil_div(cols + (k0 & 63), 64)) * 8;
  if (side < 64) memset(out.bytes, 0, rows * out.stride);
  for (uint64_t n = n0; n < n1; n = next(n, n1))
    for (uint64_t k = k0; k < k1; k = next(k, k1)) draw_hadamard_tile(d, n, next(n, n1), k, next(k, k1), out);
}

// Rows and columns from (n0, k0) of the shard.
inline void draw_region(const Draw& d, int64_t n0, int64_t rows, int64_t k0, int64_t cols, Region& out) {
  const uint32_t n = d.row_offset + uint32_t(n0), k = d.col_offset + uint32_t(k0);
  switch (d.kind) {
    case Noise::kRademacher: return draw_rademacher(d, n, uint32_t(rows), k, uint32_t(cols), out);
    case Noise::kNearGaussian: return draw_near_gaussian(d, n, uint32_t(rows), k, uint32_t(cols), out);
    case Noise::kHadamard: return draw_hadamard(d, n, uint32_t(rows), k, uint32_t(cols), out);
    default: return;
  }
}

}  // namespace FLATLORA_ISA
}  // namespace flatlora
