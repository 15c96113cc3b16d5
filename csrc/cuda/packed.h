// Packed weights as flatlora_kernels/core/quantized.py describes them: from bytes to values, here and nowhere else.
// Every step is rounded by itself, in float32: nothing is contracted (-fmad=false).
#pragma once

#include <type_traits>

#include "noise.h"

namespace flatlora {

// 8 elements of type T as bits: see Chunk. A value's bits, rounded to T.
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

// --- Rows of 4 or 8 bits whose chunks are whole words with one scale ---

struct PackedRows {
  const uint8_t* codes;  // of the view's first element
  int64_t row_bytes, bits;
  uint32_t first, second;  // selectors that put the codes of a word in the order of columns
  const float* table;
  const void* scale;
  int64_t row, col, scale_dtype, scale_stride, row_shift, col_shift, nested_shift;
  const float *scale_table, *nested, *offset;
  int64_t dtype;
  float post;
};

// What a chunk is made of, as it comes from memory.
struct PackedChunk {
  uint32_t codes[2];
  uint32_t scale;  // bits
  float nested;
};

// `table` and, behind it, `scale_table` in shared memory.
constexpr int kPackedTable = 1024, kPackedTables = 2 * kPackedTable;

// Before any thread decodes.
FLATLORA_DEVICE void load_tables(const PackedRows& p, gpu::Shared tables, int threads) {
  FLATLORA_NO_UNROLL
  for (int i = gpu::thread(); i < 1 << int(p.bits); i += threads)
    gpu::store_shared(tables + 4 * i, gpu::load_global<float>(p.table + i));
  if (p.scale_table != nullptr) {
    FLATLORA_NO_UNROLL
    for (int i = gpu::thread(); i < 256; i += threads)
      gpu::store_shared(tables + kPackedTable + 4 * i, gpu::load_global<float>(p.scale_table + i));
  }
}

// The index of the scale of element (n, k) of the view.
FLATLORA_DEVICE int64_t scale_index(const PackedRows& p, int64_t n, int64_t k) {
  return ((n + p.row) >> p.row_shift) * p.scale_stride + ((k + p.col) >> p.col_shift);
}
FLATLORA_DEVICE void load_scale(PackedChunk& c, const PackedRows& p, int64_t index) {
  c.nested = 1.0f;
  if (p.scale_dtype == int64_t(DType::kByte)) {
    c.scale = gpu::load_global<uint8_t>(static_cast<const uint8_t*>(p.scale) + index);
    if (p.nested != nullptr) c.nested = gpu::load_global<float>(p.nested + (index >> p.nested_shift));
  } else if (p.scale_dtype == int64_t(DType::kFloat32)) {
    c.scale = gpu::load_global<uint32_t>(static_cast<const float*>(p.scale) + index);
  } else {
    c.scale = gpu::load_global<uint16_t>(static_cast<const uint16_t*>(p.scale) + index);
  }
}
FLATLORA_DEVICE float scale_of(const PackedChunk& c, const PackedRows& p, gpu::Shared tables) {
  if (p.scale_dtype == int64_t(DType::kByte)) {
    const float scale = gpu::load_shared<float>(tables + kPackedTable + 4 * c.scale) * c.nested;
    return p.offset == nullptr ? scale : scale + gpu::load_global<float>(p.offset);
  }
  if (p.scale_dtype == int64_t(DType::kFloat32)) return as_float(c.scale);
  if (p.scale_dtype == int64_t(DType::kBFloat16)) return as_float(c.scale << 16);
  return gpu::f16_to_float(uint16_t(c.scale));
}

// From `codes`, which `bits` says are one word or two.
FLATLORA_DEVICE void load_codes(PackedChunk& c, const PackedRows& p, const uint8_t* codes) {
  if (p.bits == 4) {
    c.codes[0] = gpu::load_global<uint32_t>(codes);
    c.codes[1] = 0;
  } else {
    const auto words = gpu::load_global<gpu::Words<2>>(codes);
    c.codes[0] = words.v[0];
    c.codes[1] = words.v[1];
  }
}

template <class T>
FLATLORA_DEVICE Chunk<T> decoded(const PackedChunk& c, const PackedRows& p, gpu::Shared tables) {
  const float scale = scale_of(c, p, tables);
  uint32_t codes[2] = {c.codes[0], c.codes[1]};  // a byte each
  if (p.bits == 4) {
    const uint32_t low = c.codes[0] & 0x0f0f0f0fu, high = c.codes[0] >> 4 & 0x0f0f0f0fu;
    codes[0] = gpu::byte_permute(low, high, p.first);
    codes[1] = gpu::byte_permute(low, high, p.second);
  }
  float v[8];
  FLATLORA_UNROLL
  for (int j = 0; j < 8; ++j) {
    const uint32_t word = codes[j / 4], at = (j % 4 == 0 ? word << 2 : word >> (8 * (j % 4) - 2)) & 0x3fcu;
    v[j] = gpu::load_shared<float>(tables | at) * scale;
  }
  if (p.post != 1.0f) {
    FLATLORA_UNROLL
    for (int j = 0; j < 8; ++j) v[j] = v[j] * p.post;
  }
  if (p.dtype != int64_t(DType::kFloat32)) {
    FLATLORA_UNROLL
    for (int j = 0; j < 8; ++j) v[j] = rounded_to(p.dtype, v[j]);
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
inline bool packed_rows(const PackedArgs& p, int64_t K, int64_t dtype, PackedRows* rows) {
  if (p.row_bits != nullptr || p.zero != nullptr || (p.bits != 4 && p.bits != 8)) return false;
  if (p.width % 8 || p.col % 8 || K % 8 || reinterpret_cast<uintptr_t>(p.codes) % uintptr_t(p.bits)) return false;
  PackedRows r = {};
  int64_t row_block = p.block_rows, col_block = p.block_cols;
  r.scale_stride = p.scale_stride;
  if (p.block) {
    if (p.width % p.block) return false;  // blocks cross rows
    row_block = 1;
    col_block = p.block;
    r.scale_stride = p.width / p.block;
  }
  r.row_shift = shift_of(row_block);
  r.col_shift = col_block >= p.width ? 62 : shift_of(col_block);
  r.nested_shift = p.nested == nullptr ? 0 : shift_of(p.nested_block);
  if (r.row_shift < 0 || r.col_shift < 3 || r.nested_shift < 0) return false;
  r.codes = p.codes + (p.row * p.width + p.col) * p.bits / 8;
  r.row_bytes = p.width * p.bits / 8;
  r.bits = p.bits;
  r.first = p.high_first ? 0x1504u : 0x5140u;
  r.second = p.high_first ? 0x3726u : 0x7362u;
  r.table = p.table;
  r.scale = p.scale;
  r.row = p.row;
  r.col = p.col;
  r.scale_dtype = p.scale_dtype;
  r.scale_table = p.scale_table;
  r.nested = p.nested;
  r.offset = p.offset;
  r.post = float(p.post);
  // What the type of the call rounds to anyway needs no step of its own.
  r.dtype = p.dtype == dtype ? int64_t(DType::kFloat32) : p.dtype;
  *rows = r;
  return true;
}

}  // namespace flatlora
