// Packed weights, see flatlora_kernels/core/quantized.py: the one place of this backend that turns codes into values.
// What comes after sees an ordinary weight, a few rows of it at a time.
#pragma once

#include <type_traits>

#include "region.h"

namespace flatlora {
namespace FLATLORA_ISA {

template <class T>
SIMD F rounded(F x) {
  T lanes[W];
  store(lanes, x);
  return load(lanes);
}
SIMD F rounded(F x, DType dtype) {
  if (dtype == DType::kBFloat16) return rounded<bfloat16>(x);
  if (dtype == DType::kFloat16) return rounded<float16>(x);
  return x;
}

template <class T>
SIMD void store_values(T* out, F x) {
  store(out, x);
}
SIMD void store_values(double* out, F x) {
  float lanes[W];
  store(lanes, x);
  for (int i = 0; i < W; ++i) out[i] = lanes[i];
}
template <class T>
SIMD void store_values(T* out, F x, int64_t n) {
  T lanes[W];
  store_values(lanes, x);
  for (int64_t i = 0; i < n; ++i) out[i] = lanes[i];
}

// Of codes of 4 bits the table is as short as a vector: it is looked up as it is, in the type of the call.
template <class T>
struct Codes16 {
  const T* table;
  explicit SIMD Codes16(const T* p) : table(p) {}
  // 16 codes of 8 bytes.
  SIMD void operator()(const uint8_t* codes, bool high_first, T* out) const {
    for (int i = 0; i < 16; ++i) out[i] = table[codes[i / 2] >> (4 * ((i & 1) ^ int(high_first))) & 15];
  }
};
#if defined(__AVX512F__) || defined(__AVX2__)
template <>
struct Codes16<float> : FloatTable {
  explicit SIMD Codes16(const float* table) : FloatTable(table) {}
};
template <>
struct Codes16<bfloat16> : HalfTable {
  explicit SIMD Codes16(const bfloat16* table) : HalfTable(table) {}
};
template <>
struct Codes16<float16> : HalfTable {
  explicit SIMD Codes16(const float16* table) : HalfTable(table) {}
};
#endif

// Index of the block that an index lies in: a division takes longer than a block of values, and most lengths are powers
// of two.
struct Blocks {
  int64_t length;
  int shift;
  explicit SIMD Blocks(int64_t n) : length(n), shift(n > 0 && (n & (n - 1)) == 0 ? __builtin_ctzll(uint64_t(n)) : -1) {}
  SIMD int64_t of(int64_t i) const { return shift >= 0 ? i >> shift : i / length; }
};

// A packed weight; rows and columns count from the first of what was packed.
template <class T>
class Decoder {
 public:
  explicit Decoder(const PackedArgs& args)
      : p(args),
        difference(DType(p.difference_dtype)),
        dtype(DType(p.dtype)),
        post(float(p.post)),
        blocks(p.block ? p.block : p.block_cols),
        nested_blocks(p.nested_block) {
    // A value is rounded to T as it is stored.
    if (std::is_same_v<T, bfloat16> && dtype == DType::kBFloat16) dtype = DType::kFloat32;
    if (std::is_same_v<T, float16> && dtype == DType::kFloat16) dtype = DType::kFloat32;
    rounds = is_short(difference) || is_short(dtype);
  }

  void row(int64_t n, int64_t k, int64_t cols, T* out) {
    if (flat() && p.bits == 4) return runs(n, k, cols, out, [&](auto... run) { nibbles(run...); });
    if (flat() && p.bits == 8 && !p.high_first) return runs(n, k, cols, out, [&](auto... run) { bytes(run...); });
    anywhere(n, k, cols, out);
  }

  // Whether `columns` takes these: codes of 4 bits, eight of one scale in a word of every row.
  bool has_columns(int64_t k, int64_t cols) const {
    const int64_t length = blocks.length;
    return flat() && p.bits == 4 && p.width % 2 == 0 && k % 8 == 0 && cols % 8 == 0 &&
           (length % 8 == 0 || length >= p.width) && (p.block == 0 || p.width % p.block == 0);
  }
  // At most W rows and kMostCols columns, each of W values: what wants lanes along n is spared the transpose of values,
  // where that of codes takes an eighth.
  static constexpr int64_t kMostCols = kRegionLong;
  void columns(int64_t n, int64_t k, int64_t rows, int64_t cols, T* out) {
    const int64_t first = blocks.of(k), count = blocks.of(k + cols - 1) - first + 1;
    float scale[(kMostCols / 8 + 1) * W], zero[(kMostCols / 8 + 1) * W];
    for (int64_t j = 0; rows < W && j < count * W; ++j) scale[j] = 0;
    const int64_t row_blocks = p.block ? blocks.of(p.width) : 0;
    int64_t index[W];
    for (int64_t i = 0; i < rows; ++i) {
      index[i] = first + (p.block ? (n + i) * row_blocks : (n + i) / p.block_rows * p.scale_stride);
      for (int64_t j = 0; p.zero && j < count; ++j) zero[j * W + i] = zero_at(index[i] + j);
    }
    block_scales(index, rows, 1, count, W, scale);
    const FloatTable table(p.table);
    const uint8_t* codes = p.codes + (n * p.width + k) / 2;
    int64_t end = (first + 1) * blocks.length - k;  // of the block of column c
    const float *s = scale, *z = zero;
    for (int64_t c = 0; c < cols;) {
      const int64_t here = min64(W, (cols - c) / 8);
      F words[W];
      // Pieces of rows are too short for the hardware's prefetcher.
      for (int i = 0; i < W; ++i) __builtin_prefetch(codes + (i * p.width + c) / 2 + 128);
      for (int i = 0; i < W; ++i)
        words[i] = i < rows ? load_words_at(codes + (i * p.width + c) / 2, here) : splat(F(), 0.0f);
      transpose(words);
      for (int64_t w = 0; w < here; ++w, c += 8) {
        if (c >= end) end += blocks.length, s += W, z += W;
        const F block_scale = load(s);
        if (p.zero || rounds || post != 1.0f) {
          const F block_zero = p.zero ? load(z) : splat(F(), 0.0f);
          eight(table, as_int(words[w]), out + c * W, [&](F x) { return value(x, block_zero, block_scale); });
        } else {
          eight(table, as_int(words[w]), out + c * W, [&](F x) { return mul(x, block_scale); });
        }
      }
    }
  }

 private:
  bool flat() const { return p.row_bits == nullptr && p.zero_bits == 0; }

  static SIMD F load_words_at(const uint8_t* p, int64_t n) {
    if (n < W) return load(reinterpret_cast<const float*>(p), int(n));
    float words[W];
    memcpy(words, p, sizeof words);
    return load(words);
  }
  template <int kCode = 0, class Value>
  SIMD void eight(const FloatTable& table, I word, T* out, const Value& value) const {
    store_values(out + (kCode ^ int(p.high_first)) * W, value(table.at(shift_right<4 * kCode>(word))));
    if constexpr (kCode < 7) eight<kCode + 1>(table, word, out, value);
  }

  static bool is_short(DType type) { return type == DType::kBFloat16 || type == DType::kFloat16; }

  SIMD F value(F x, F zero, F scale) const {
    x = sub(x, zero);
    if (!rounds) return mul(mul(x, scale), splat(F(), post));
    return rounded(mul(mul(rounded(x, difference), scale), splat(F(), post)), dtype);
  }

  static SIMD float number_at(const void* numbers, int64_t dtype, int64_t i) {
    if (DType(dtype) == DType::kFloat32) return static_cast<const float*>(numbers)[i];
    if (DType(dtype) == DType::kBFloat16) return to_float(static_cast<const bfloat16*>(numbers)[i]);
    return to_float(static_cast<const float16*>(numbers)[i]);
  }
  SIMD float zero_at(int64_t i) const { return p.zero ? number_at(p.zero, p.zero_dtype, i) : 0.0f; }
  // Those of `count` blocks from each of `rows` indices on.
  SIMD void block_scales(const int64_t* index, int64_t rows, int64_t row_stride, int64_t count, int64_t stride,
                         float* out) const {
    const auto each = [&](const auto& scale) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < count; ++j) out[i * row_stride + j * stride] = scale(index[i] + j);
    };
    if (p.scale_table) {
      const auto* codes = static_cast<const uint8_t*>(p.scale);
      const float offset = p.offset ? *p.offset : 0.0f;
      if (!p.nested) return each([&](int64_t j) { return add_offset(p.scale_table[codes[j]], offset); });
      int64_t begin = 0, end = 0;
      float nested = 0;
      return each([&](int64_t j) {
        if (j < begin || j >= end) {
          const int64_t block = nested_blocks.of(j);
          nested = p.nested[block];
          begin = block * p.nested_block;
          end = begin + p.nested_block;
        }
        return add_offset(p.scale_table[codes[j]] * nested, offset);
      });
    }
    each([&](int64_t j) { return number_at(p.scale, p.scale_dtype, j); });
  }
  SIMD float add_offset(float scale, float offset) const { return p.offset ? scale + offset : scale; }

  // run(element, count, scale, zero, out) of each run of columns that share a scale, of what is flat.
  template <class Run>
  SIMD void runs(int64_t n, int64_t k, int64_t cols, T* out, const Run& run) const {
    constexpr int64_t kAtOnce = 16;
    const int64_t length = blocks.length, from = p.block ? n * p.width + k : k;
    int64_t element = n * p.width + k, index = blocks.of(from), left = (index + 1) * length - from;
    if (p.block == 0) index += n / p.block_rows * p.scale_stride;
    while (cols > 0) {
      float scale[kAtOnce];
      int64_t known = 1;
      for (int64_t end = left; known < kAtOnce && end < cols; end += length) ++known;
      block_scales(&index, 1, 0, known, 1, scale);
      for (int64_t i = 0; i < known; ++i, ++index) {
        const int64_t count = min64(left, cols);
        run(element, count, scale[i], zero_at(index), out);
        element += count, out += count, cols -= count;
        left = length;
      }
    }
  }

  SIMD void nibbles(int64_t element, int64_t count, float scale, float zero, T* out) const {
    alignas(64) T table[16];
    for (int i = 0; i < 16; i += W)
      store_values(table + i, value(load(p.table + i), splat(F(), zero), splat(F(), scale)));
    const bool high_first = p.high_first != 0;
    const uint8_t* codes = p.codes + (element >> 1);
    if (element & 1) {
      *out++ = table[*codes++ >> (high_first ? 0 : 4) & 15];
      --count;
    }
    const Codes16<T> look_up(table);
    for (; count >= 16; count -= 16, codes += 8, out += 16) look_up(codes, high_first, out);
    if (count > 0) {
      uint8_t last[8] = {};
      T values[16];
      for (int64_t i = 0; i < (count + 1) / 2; ++i) last[i] = codes[i];
      look_up(last, high_first, values);
      for (int64_t i = 0; i < count; ++i) out[i] = values[i];
    }
  }

  SIMD F numbers(const uint8_t* codes) const {
    switch (Number(p.number)) {
      case Number::kInt8: return load(reinterpret_cast<const int8_t*>(codes));
      case Number::kUint: return load(codes);
      case Number::kE4M3: return load_e4m3(codes, p.table);
      case Number::kE5M2: return load_e5m2(codes, p.table);
      default: {
        float lanes[W];
        for (int i = 0; i < W; ++i) lanes[i] = p.table[codes[i]];
        return load(lanes);
      }
    }
  }
  SIMD void bytes(int64_t element, int64_t count, float scale, float zero, T* out) const {
    const F z = splat(F(), zero), s = splat(F(), scale);
    const uint8_t* codes = p.codes + element;
    int64_t i = 0;
    for (; i + W <= count; i += W) store_values(out + i, value(numbers(codes + i), z, s));
    if (i < count) {
      uint8_t last[W] = {};
      for (int64_t j = i; j < count; ++j) last[j - i] = codes[j];
      store_values(out + i, value(numbers(last), z, s), count - i);
    }
  }

  // A code may lie in two bytes, and only then is the second one read.
  static SIMD uint32_t code_at(const void* codes, int64_t at, int64_t bits) {
    const uint8_t* byte = static_cast<const uint8_t*>(codes) + (at >> 3);
    uint32_t word = byte[0];
    if ((at & 7) + bits > 8) word |= uint32_t(byte[1]) << 8;
    return word >> (at & 7) & ((1u << bits) - 1);
  }

  // Any layout, a value at a time: its parts are collected, then the steps done on vectors.
  void anywhere(int64_t n, int64_t k, int64_t cols, T* out) {
    constexpr int64_t kPiece = 64;
    float numbers[kPiece] = {}, scales[kPiece] = {}, zeros[kPiece] = {};
    for (; cols > 0; cols -= kPiece, k += kPiece, out += kPiece) {
      const int64_t count = min64(cols, kPiece);
      int64_t last = -1;
      float scale = 0, zero = 0;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t element = n * p.width + k + j;
        const int64_t at = p.row_bits ? p.row_bits[n] + p.col_bits[k + j] : (element ^ p.high_first) * p.bits;
        numbers[j] = p.table[code_at(p.codes, at, p.bits)];
        int64_t index;
        if (p.row_bits) {
          index = p.row_scales[n] + p.col_scales[k + j];
        } else {
          index = p.block ? blocks.of(element) : n / p.block_rows * p.scale_stride + blocks.of(k + j);
        }
        if (index != last) {
          last = index;
          block_scales(&index, 1, 0, 1, 1, &scale);
          if (p.zero_bits == 0) zero = zero_at(index);
        }
        if (p.zero_bits) zero = float(code_at(p.zero, p.row_zeros[n] + p.col_zeros[k + j], p.zero_bits) + p.zero_plus);
        scales[j] = scale;
        zeros[j] = zero;
      }
      for (int64_t j = 0; j < count; j += W) {
        const F x = value(load(numbers + j), load(zeros + j), load(scales + j));
        if (j + W <= count) {
          store_values(out + j, x);
        } else {
          store_values(out + j, x, count - j);
        }
      }
    }
  }

  const PackedArgs& p;
  DType difference, dtype;
  float post;
  bool rounds;
  Blocks blocks, nested_blocks;
};

// (rows, cols) from (n, k) of the weight.
template <class T>
__attribute__((noinline)) void decode(const PackedArgs& p, int64_t n, int64_t k, int64_t rows, int64_t cols, T* out,
                                      int64_t stride) {
  Decoder<T> decoder(p);
  for (int64_t i = 0; i < rows; ++i) decoder.row(p.row + n + i, p.col + k, cols, out + i * stride);
}
// The same of at most W rows with columns side by side, W values each; false where it has to go by rows.
template <class T>
__attribute__((noinline)) bool decode_columns(const PackedArgs& p, int64_t n, int64_t k, int64_t rows, int64_t cols,
                                              T* out) {
  Decoder<T> decoder(p);
  if (!decoder.has_columns(p.col + k, cols)) return false;
  decoder.columns(p.row + n, p.col + k, rows, cols, out);
  return true;
}

}  // namespace FLATLORA_ISA
}  // namespace flatlora
