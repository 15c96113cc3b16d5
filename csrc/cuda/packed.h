// Packed weights as flatlora_kernels/core/quantized.py describes them: from bytes to values, here and nowhere else.
// Every step is rounded by itself, in float32: nothing is contracted (-fmad=false).
#pragma once

#include <type_traits>

#include "noise.h"

namespace flatlora {

// An element of type T as it lies in memory, and that of `v` rounded to T.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
template <class T>
FLATLORA_DEVICE uint32_t bits_of(float v) {
  if constexpr (sizeof(T) == 4)
    return as_int(v);
  else
    return pack(T{}, v, 0.0f) & 0xffffu;
}

// As a type holds it; `dtype`: enum DType.
FLATLORA_DEVICE float rounded_to(int64_t dtype, float v) {
  if (dtype == int64_t(DType::kBFloat16)) return as_float(gpu::pack_bf16(0.0f, v));
  if (dtype == int64_t(DType::kFloat16)) return gpu::f16_to_float(uint16_t(gpu::pack_f16(v, 0.0f)));
  return v;
}

// --- Any layout, a value at a time ---

// x / by, where a division would be a subroutine. 0 <= x < 2^53.
struct Divisor {
  int64_t by, shift;  // shift: -1 where `by` is no power of two
  double inverse;

  FLATLORA_DEVICE int64_t operator()(int64_t x) const {
    if (shift >= 0) return x >> shift;
    const int64_t quotient = int64_t(double(x) * inverse), rest = x - quotient * by;
    return quotient - (rest < 0) + (rest >= by);
  }
};

// What kernels get of a PackedArgs.
struct Packed {
  PackedArgs args;
  Divisor block, block_rows, block_cols, nested_block;
};

// The code of `width` bits at address `bit` of `count` bytes.
FLATLORA_DEVICE uint32_t code_at(const void* bytes, int64_t bit, int width, int64_t count) {
  const uint8_t* const p = static_cast<const uint8_t*>(bytes) + (bit >> 3);
  uint32_t word = gpu::load_global<uint8_t>(p);
  const int first = int(bit & 7);
  if (first + width > 8 && (bit >> 3) + 1 < count) word |= uint32_t(gpu::load_global<uint8_t>(p + 1)) << 8;
  return word >> first & ((1u << width) - 1);
}

// Element (n, k) of the view, before it gets the type of the call.
FLATLORA_DEVICE float packed_value(const Packed& packed, int64_t n, int64_t k) {
  const PackedArgs& p = packed.args;
  n += p.row;
  k += p.col;
  int64_t bit, index;
  if (p.row_bits == nullptr) {
    const int64_t i = n * p.width + k;
    bit = (i ^ p.high_first) * p.bits;
    index = p.block ? packed.block(i) : packed.block_rows(n) * p.scale_stride + packed.block_cols(k);
  } else {
    bit = gpu::load_global<int64_t>(p.row_bits + n) + gpu::load_global<int64_t>(p.col_bits + k);
    index = gpu::load_global<int64_t>(p.row_scales + n) + gpu::load_global<int64_t>(p.col_scales + k);
  }
  float v = gpu::load_global<float>(p.table + code_at(p.codes, bit, int(p.bits), p.bytes));
  if (p.zero_bits) {
    bit = gpu::load_global<int64_t>(p.row_zeros + n) + gpu::load_global<int64_t>(p.col_zeros + k);
    v = v - float(int(code_at(p.zero, bit, int(p.zero_bits), INT64_MAX)) + int(p.zero_plus));
  } else if (p.zero != nullptr) {
    v = v - float_at(p.zero, p.zero_dtype, index);
  }
  v = rounded_to(p.difference_dtype, v);
  float scale;
  if (p.scale_dtype == int64_t(DType::kByte)) {
    const uint8_t byte = gpu::load_global<uint8_t>(static_cast<const uint8_t*>(p.scale) + index);
    scale = gpu::load_global<float>(p.scale_table + byte);
    if (p.nested != nullptr) scale = scale * gpu::load_global<float>(p.nested + packed.nested_block(index));
    if (p.offset != nullptr) scale = scale + gpu::load_global<float>(p.offset);
  } else {
    scale = float_at(p.scale, p.scale_dtype, index);
  }
  v = v * scale;
  if (p.post != 1.0) v = v * float(p.post);
  return rounded_to(p.dtype, v);
}

// --- Rows of 4 or 8 bits whose chunks are 4 or 8 whole bytes with one scale ---

struct PackedRows {
  const uint8_t* codes;  // of the view's first element
  int64_t row_bytes, bits, high_first;
  const float* table;
  const uint8_t* scale;
  uint32_t row, col, scale_stride, row_shift, col_shift, nested_shift;
  uint32_t scales,
      scale_shift;  // as many as the view may read; log2 of bytes: 0 = looked up, 1 = bfloat16, 2 = float32
  uint32_t rounds;               // to the other type of 16 bits first
  const float *scale_table, *nested, *offset;
  float post;
};

// What a chunk is made of.
struct PackedChunk {
  uint32_t codes[2];
  uint32_t scale;  // where it is looked up its low byte, else a float32's bits
  float nested;
};

// Of the code, or for 4 bits of a byte's two codes in the order of their columns.
constexpr int kPackedTable = 2048;

// Before any thread decodes, and a barrier behind it.
template <int kBits>
FLATLORA_DEVICE void load_table(const PackedRows& p, gpu::Shared table, int threads) {
  FLATLORA_NO_UNROLL
  for (int i = gpu::thread(); i < 256; i += threads) {
    if constexpr (kBits == 8) {
      gpu::store_shared(table + 4 * i, gpu::load_global<uint32_t>(p.table + i));
    } else {
      const int low = i & 15, high = i >> 4;
      const uint32_t first = gpu::load_global<uint32_t>(p.table + (p.high_first ? high : low));
      const uint32_t second = gpu::load_global<uint32_t>(p.table + (p.high_first ? low : high));
      gpu::store_shared(table + 8 * i, gpu::Words<2>{{first, second}});
    }
  }
}

FLATLORA_DEVICE uint32_t scale_row(const PackedRows& p, uint32_t n) {
  return ((n + p.row) >> p.row_shift) * p.scale_stride;
}
FLATLORA_DEVICE uint32_t scale_col(const PackedRows& p, uint32_t k) { return (k + p.col) >> p.col_shift; }

// What is added to every scale that is looked up; -0 changes none.
FLATLORA_DEVICE float scale_offset(const PackedRows& p) {
  return p.offset == nullptr ? -0.0f : gpu::load_global<float>(p.offset);
}
FLATLORA_DEVICE float scale_of(const PackedChunk& c, const PackedRows& p, bool looked_up, float offset) {
  if (!looked_up) return as_float(c.scale);
  return gpu::load_global<float>(p.scale_table + (c.scale & 0xff)) * c.nested + offset;
}

// The chunk at `codes` and its scale. kScaleBytes: 1, or 4 for 2 as well.
template <int kBits, int kScaleBytes>
FLATLORA_DEVICE PackedChunk load_packed(const PackedRows& p, const uint8_t* codes, uint32_t index) {
  PackedChunk c = {};
  if constexpr (kBits == 8) {
    const auto words = gpu::load_global<gpu::Words<2>>(codes);
    c.codes[0] = words.v[0];
    c.codes[1] = words.v[1];
  } else {
    c.codes[0] = gpu::load_global<uint32_t>(codes);
  }
  const uint8_t* const scale = p.scale + (uint64_t(index) << (kScaleBytes == 1 ? 0 : p.scale_shift));
  if constexpr (kScaleBytes == 1) {
    c.scale = gpu::load_global<uint8_t>(scale);
    c.nested = p.nested == nullptr ? 1.0f : gpu::load_global<float>(p.nested + (index >> p.nested_shift));
  } else {
    c.scale = p.scale_shift == 2 ? gpu::load_global<uint32_t>(scale) : gpu::load_global<uint16_t>(scale) << 16;
  }
  return c;
}

// kRounds: there may be a type to be rounded to before T.
template <class T, int kBits, bool kRounds>
FLATLORA_DEVICE Chunk<T> decoded(const PackedChunk& c, const PackedRows& p, gpu::Shared table, float scale) {
  float v[8];
  FLATLORA_UNROLL
  for (int j = 0; j < kBits; ++j) {  // bytes
    const uint32_t at = c.codes[j / 4] >> (8 * (j % 4)) & 0xff;
    if constexpr (kBits == 8) {
      v[j] = gpu::load_shared<float>(table + 4 * at) * scale;
    } else {
      const auto pair = gpu::load_shared<gpu::Words<2>>(table + 8 * at);
      v[2 * j] = as_float(pair.v[0]) * scale;
      v[2 * j + 1] = as_float(pair.v[1]) * scale;
    }
  }
  if (kBits == 8 && p.post != 1.0f) {
    FLATLORA_UNROLL
    for (int j = 0; j < 8; ++j) v[j] = v[j] * p.post;
  }
  if (kRounds && p.rounds) {
    using Other = std::conditional_t<std::is_same_v<T, gpu::bf16>, gpu::f16, gpu::bf16>;
    FLATLORA_UNROLL
    for (int j = 0; j < 8; j += 2) unpack(Other{}, pack(Other{}, v[j], v[j + 1]), v[j], v[j + 1]);
  }
  Chunk<T> w;
  FLATLORA_UNROLL
  for (int q = 0; q < 4; ++q) w.v[q] = pack(T{}, v[2 * q], v[2 * q + 1]);
  return w;
}

// --- The host's side ---

inline int64_t shift_of(int64_t x) {  // -1 where x is no power of two
  for (int64_t shift = 0; shift < 63; ++shift)
    if (x == int64_t(1) << shift) return shift;
  return -1;
}

inline Packed packed_of(const PackedArgs& args) {
  const auto divisor = [](int64_t by) { return Divisor{by, shift_of(by), by > 0 ? 1.0 / double(by) : 0.0}; };
  return {args, divisor(args.block), divisor(args.block_rows), divisor(args.block_cols), divisor(args.nested_block)};
}

// Whether the chunks of (N, K) are as PackedRows has them, in a call of the type `dtype`.
inline bool packed_rows(const PackedArgs& p, int64_t N, int64_t K, int64_t dtype, PackedRows* rows) {
  const auto aligned = [](const void* data, int64_t to) { return reinterpret_cast<uintptr_t>(data) % to == 0; };
  if (p.row_bits != nullptr || p.zero != nullptr || (p.bits != 4 && p.bits != 8)) return false;
  if (p.scale_dtype == int64_t(DType::kFloat16)) return false;
  if (p.width % 8 || p.col % 8 || K % 8 || !aligned(p.codes, p.bits) || !aligned(p.scale, 4)) return false;
  if (p.bits == 4 ? p.post != 1.0 : p.scale_dtype == int64_t(DType::kByte)) return false;
  if (p.block && p.width % p.block) return false;  // blocks cross rows
  const int64_t row_shift = p.block ? 0 : shift_of(p.block_rows), block = p.block ? p.block : p.block_cols;
  const int64_t col_shift = block >= p.width ? 31 : shift_of(block);
  const int64_t nested_shift = p.nested == nullptr ? 0 : shift_of(p.nested_block);
  if (row_shift < 0 || col_shift < 3 || nested_shift < 0) return false;
  const int64_t scale_stride = p.block ? p.width / p.block : p.scale_stride;
  const int64_t scales = ((p.row + N - 1) >> row_shift) * scale_stride + ((p.col + K - 1) >> col_shift) + 1;
  if (scales > INT32_MAX / 4 || p.row + N > INT32_MAX || p.col + K > INT32_MAX) return false;
  PackedRows r = {};
  r.codes = p.codes + (p.row * p.width + p.col) * p.bits / 8;
  r.row_bytes = p.width * p.bits / 8;
  r.bits = p.bits;
  r.high_first = p.high_first;
  r.table = p.table;
  r.scale = static_cast<const uint8_t*>(p.scale);
  r.row = uint32_t(p.row);
  r.col = uint32_t(p.col);
  r.scale_stride = uint32_t(scale_stride);
  r.row_shift = uint32_t(row_shift < 31 ? row_shift : 31);
  r.col_shift = uint32_t(col_shift < 31 ? col_shift : 31);
  r.nested_shift = uint32_t(nested_shift < 31 ? nested_shift : 31);
  r.scale_shift = p.scale_dtype == int64_t(DType::kByte) ? 0 : p.scale_dtype == int64_t(DType::kFloat32) ? 2 : 1;
  r.scales = uint32_t(scales);
  r.rounds = p.dtype != dtype && (p.dtype == int64_t(DType::kBFloat16) || p.dtype == int64_t(DType::kFloat16));
  r.scale_table = p.scale_table;
  r.nested = p.nested;
  r.offset = p.offset;
  r.post = float(p.post);
  *rows = r;
  return true;
}

}  // namespace flatlora
