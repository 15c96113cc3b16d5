// One vector interface, three instruction sets. The build compiles kernels.cpp once per level, with that level's
// compiler flags and FLATLORA_ISA set to its name, which also is the namespace: nothing of one level may be linked
// into another.
//
//   F      kWidth floats              I      kWidth 32-bit words
//   Words  kWidth Philox words; where lanes are 64 bits wide their upper halves are garbage
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/philox.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define SIMD inline __attribute__((always_inline))

namespace flatlora {
namespace FLATLORA_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

SIMD float to_float(float x) { return x; }
SIMD float to_float(int8_t x) { return x; }
SIMD float to_float(uint8_t x) { return x; }
SIMD float to_float(bfloat16 x) { return scalar::as_float(uint32_t(x.bits) << 16); }
SIMD float to_float(float16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, magnitude = h.bits & 0x7fff;
  if (magnitude >= 0x7c00) return scalar::as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // 2^112 moves the exponent's bias, subnormals included.
  return scalar::as_float(sign | scalar::as_int(scalar::as_float(magnitude << 13) * 5.192296858534828e33f));
}
SIMD void from_float(float x, float& out) { out = x; }
SIMD void from_float(float x, bfloat16& out) {
  const uint32_t i = scalar::as_int(x);
  out.bits = x != x ? uint16_t(i >> 16 | 0x40) : uint16_t((i + 0x7fff + (i >> 16 & 1)) >> 16);
}
SIMD void from_float(float x, float16& out) {
  const uint32_t i = scalar::as_int(x), sign = i >> 16 & 0x8000, magnitude = i & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out.bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // from 65520 on: infinity
    out.bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // subnormal: the addition rounds at bit 2^-24
    out.bits = uint16_t(sign | (scalar::as_int(scalar::as_float(magnitude) + 0.5f) - 0x3f000000));
  } else {
    out.bits = uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
  }
}

#if defined(__AVX512F__)

constexpr int kWidth = 16;

struct F {
  __m512 v;
};
struct I {
  __m512i v;
};
struct Words {
  __m512i even, odd;
};

SIMD F splat(F, float x) { return {_mm512_set1_ps(x)}; }
SIMD I splat(I, uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
SIMD Words splat(Words, uint32_t x) { return {_mm512_set1_epi32(int(x)), _mm512_set1_epi32(int(x))}; }
SIMD F add(F x, F y) { return {_mm512_add_ps(x.v, y.v)}; }
SIMD F sub(F x, F y) { return {_mm512_sub_ps(x.v, y.v)}; }
SIMD F mul(F x, F y) { return {_mm512_mul_ps(x.v, y.v)}; }
SIMD F fma(F x, F y, F z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
SIMD F sqrt(F x) { return {_mm512_sqrt_ps(x.v)}; }
SIMD F as_float(I x) { return {_mm512_castsi512_ps(x.v)}; }
SIMD I as_int(F x) { return {_mm512_castps_si512(x.v)}; }
SIMD I add(I x, I y) { return {_mm512_add_epi32(x.v, y.v)}; }
SIMD I and_or(I x, I mask, I bits) { return {_mm512_ternarylogic_epi32(x.v, mask.v, bits.v, 0xEA)}; }
template <int kBits>
SIMD I shift_right(I x) {
  return {_mm512_srli_epi32(x.v, kBits)};
}
SIMD F exponent(I x) { return {_mm512_cvtepi32_ps(_mm512_srai_epi32(x.v, 23))}; }
SIMD F flip_sign(F x, I word) {  // x ^ (word & top bit)
  return {_mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(_mm512_castps_si512(x.v), word.v, _mm512_set1_epi32(int(0x80000000)), 0x78))};
}
SIMD I iota() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
SIMD I load_words(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
SIMD void store_words(uint32_t* p, I x) { _mm512_storeu_si512(p, x.v); }
// The 32-bit word at each byte offset.
SIMD I gather(const uint8_t* p, I offset) { return {_mm512_i32gather_epi32(offset.v, p, 1)}; }
// Byte i of each word to row i of `p`.
SIMD void store_bytes(uint8_t* p, int64_t stride, I x) {
  for (int i = 0; i < 4; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i * stride), _mm512_cvtepi32_epi8(_mm512_srli_epi32(x.v, 8 * i)));
}
// x in every lane, negated where the lane's bit is set.
SIMD F flip_signs(float x, const uint8_t* bits) {
  uint16_t mask;
  memcpy(&mask, bits, 2);
  return {_mm512_mask_blend_ps(mask, _mm512_set1_ps(x), _mm512_set1_ps(-x))};
}
SIMD I shift_left(I x, I count) { return {_mm512_sllv_epi32(x.v, count.v)}; }
template <int kBits>
SIMD I shift_left(I x) {
  return {_mm512_slli_epi32(x.v, kBits)};
}
SIMD I bit_and(I x, I y) { return {_mm512_and_si512(x.v, y.v)}; }
SIMD I swap_halves(I x) { return {_mm512_rol_epi32(x.v, 16)}; }

// The same on bytes: table[index] of indices below 16, x negated where the top bit of `sign` is set.
SIMD I look_up(const int8_t* table, I index) {
  const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), index.v)};
}
SIMD I negate_bytes(I x, I sign) {
  return {_mm512_mask_sub_epi8(x.v, _mm512_movepi8_mask(sign.v), _mm512_setzero_si512(), x.v)};
}
SIMD I add_bytes(I x, I y) { return {_mm512_add_epi8(x.v, y.v)}; }
SIMD I sub_bytes(I x, I y) { return {_mm512_sub_epi8(x.v, y.v)}; }
// Four words of each lane, the middle bytes of each swapped, to row lane % 8 of `p`; from lane 8 on `far` rows further.
SIMD void store_rows(uint8_t* p, int64_t stride, int64_t far, I w, I x, I y, I z) {
  const __m512i a = _mm512_unpacklo_epi32(w.v, x.v), b = _mm512_unpackhi_epi32(w.v, x.v);
  const __m512i c = _mm512_unpacklo_epi32(y.v, z.v), d = _mm512_unpackhi_epi32(y.v, z.v);
  const __m512i rows[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                           _mm512_unpackhi_epi64(b, d)};
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
  for (int i = 0; i < 4; ++i, p += stride) {
    const __m512i row = _mm512_shuffle_epi8(rows[i], order);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(row));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 4 * stride), _mm512_extracti32x4_epi32(row, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + far * stride), _mm512_extracti32x4_epi32(row, 2));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + (far + 4) * stride), _mm512_extracti32x4_epi32(row, 3));
  }
}

SIMD Words split(I x) { return {x.v, _mm512_srli_epi64(x.v, 32)}; }
SIMD I join(Words x) { return {_mm512_mask_blend_epi32(0xAAAA, x.even, _mm512_slli_epi64(x.odd, 32))}; }
SIMD void mulhilo(uint32_t m, Words x, Words& hi, Words& lo) {
  const __m512i factor = _mm512_set1_epi32(int(m));
  lo = {_mm512_mul_epu32(x.even, factor), _mm512_mul_epu32(x.odd, factor)};
  hi = {_mm512_srli_epi64(lo.even, 32), _mm512_srli_epi64(lo.odd, 32)};
}
SIMD Words xor1(Words a, uint32_t key) {
  const __m512i k = _mm512_set1_epi32(int(key));
  return {_mm512_xor_si512(a.even, k), _mm512_xor_si512(a.odd, k)};
}
SIMD Words xor3(Words a, Words b, uint32_t key) {
  const __m512i k = _mm512_set1_epi32(int(key));
  return {_mm512_ternarylogic_epi64(a.even, b.even, k, 0x96), _mm512_ternarylogic_epi64(a.odd, b.odd, k, 0x96)};
}

SIMD F load(const float* p) { return {_mm512_loadu_ps(p)}; }
SIMD F load(const bfloat16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
SIMD F load(const float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
SIMD F load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
SIMD F load(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// Numbers of 8 bits, by way of float16, which has the exponents of both and more; `table` has them all.
SIMD F load_e4m3(const uint8_t* p, const float*) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i h = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(x), 7), _mm256_set1_epi16(int16_t(0xbf80)));
  const __m128i magnitude = _mm_and_si128(x, _mm_set1_epi8(0x7f));
  const __mmask16 nan = _mm_cmpeq_epi8_mask(magnitude, _mm_set1_epi8(0x7f));
  const __m512 f = _mm512_mul_ps(_mm512_cvtph_ps(h), _mm512_set1_ps(256.0f));
  return {_mm512_mask_blend_ps(nan, f, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)))};
}
SIMD F load_e5m2(const uint8_t* p, const float*) {
  const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_cvtph_ps(_mm256_slli_epi16(x, 8))};
}

// Tables of 16 numbers in registers: at(i) looks up the last 4 bits of each lane, the operator 16 codes of 8 bytes.
struct FloatTable {
  __m512 table;
  explicit SIMD FloatTable(const float* p) : table(_mm512_loadu_ps(p)) {}
  SIMD F at(I index) const { return {_mm512_permutexvar_ps(index.v, table)}; }
  SIMD void operator()(const uint8_t* codes, bool high_first, float* out) const {
    const __m512i word = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i low = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i high = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    const __m512i words = _mm512_permutexvar_epi32(word, _mm512_castsi128_si512(bytes));
    _mm512_storeu_ps(out, at({_mm512_srlv_epi32(words, high_first ? high : low)}).v);
  }
};
struct HalfTable {
  __m256i table;
  explicit SIMD HalfTable(const void* p) : table(_mm256_loadu_si256(static_cast<const __m256i*>(p))) {}
  SIMD void operator()(const uint8_t* codes, bool high_first, void* out) const {
    const __m256i word = _mm256_setr_epi16(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m256i low = _mm256_setr_epi16(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    const __m256i high = _mm256_setr_epi16(4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8);
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    const __m256i words = _mm256_permutexvar_epi16(word, _mm256_castsi128_si256(bytes));
    const __m256i index = _mm256_srlv_epi16(words, high_first ? high : low);
    _mm256_storeu_si256(static_cast<__m256i*>(out), _mm256_permutexvar_epi16(index, table));
  }
};
SIMD F load(const float* p, int n) { return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)}; }
SIMD F load(const bfloat16* p, int n) {
  const __m256i h = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
SIMD F load(const float16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p))};
}

SIMD __m256i round_bf16(F x) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
  const __m512i i = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(i, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(i, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
#endif
}
SIMD void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
SIMD void store(bfloat16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(x)); }
SIMD void store(float16* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
SIMD void store(float* p, F x, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), x.v); }
SIMD void store(bfloat16* p, F x, int n) { _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), round_bf16(x)); }
SIMD void store(float16* p, F x, int n) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

SIMD void transpose(F (&r)[16]) {
  __m512 t[16], s[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  // s[4g + j]: in 128-bit lane l, column 4l + j of rows 4g .. 4g + 3
  for (int g = 0; g < 16; g += 4) {
    for (int h = 0; h < 2; ++h) {
      const __m512d a = _mm512_castps_pd(t[g + h]), b = _mm512_castps_pd(t[g + 2 + h]);
      s[g + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      s[g + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 x0 = _mm512_shuffle_f32x4(s[j], s[4 + j], 0x88), x1 = _mm512_shuffle_f32x4(s[j], s[4 + j], 0xdd);
    const __m512 y0 = _mm512_shuffle_f32x4(s[8 + j], s[12 + j], 0x88);
    const __m512 y1 = _mm512_shuffle_f32x4(s[8 + j], s[12 + j], 0xdd);
    r[j].v = _mm512_shuffle_f32x4(x0, y0, 0x88);
    r[4 + j].v = _mm512_shuffle_f32x4(x1, y1, 0x88);
    r[8 + j].v = _mm512_shuffle_f32x4(x0, y0, 0xdd);
    r[12 + j].v = _mm512_shuffle_f32x4(x1, y1, 0xdd);
  }
}
SIMD float sum(F x) { return _mm512_reduce_add_ps(x.v); }

#elif defined(__AVX2__)

constexpr int kWidth = 8;

struct F {
  __m256 v;
};
struct I {
  __m256i v;
};
struct Words {
  __m256i even, odd;
};

SIMD F splat(F, float x) { return {_mm256_set1_ps(x)}; }
SIMD I splat(I, uint32_t x) { return {_mm256_set1_epi32(int(x))}; }
SIMD Words splat(Words, uint32_t x) { return {_mm256_set1_epi32(int(x)), _mm256_set1_epi32(int(x))}; }
SIMD F add(F x, F y) { return {_mm256_add_ps(x.v, y.v)}; }
SIMD F sub(F x, F y) { return {_mm256_sub_ps(x.v, y.v)}; }
SIMD F mul(F x, F y) { return {_mm256_mul_ps(x.v, y.v)}; }
SIMD F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.v, y.v, z.v)}; }
SIMD F sqrt(F x) { return {_mm256_sqrt_ps(x.v)}; }
SIMD F as_float(I x) { return {_mm256_castsi256_ps(x.v)}; }
SIMD I as_int(F x) { return {_mm256_castps_si256(x.v)}; }
SIMD I add(I x, I y) { return {_mm256_add_epi32(x.v, y.v)}; }
SIMD I and_or(I x, I mask, I bits) { return {_mm256_or_si256(_mm256_and_si256(x.v, mask.v), bits.v)}; }
template <int kBits>
SIMD I shift_right(I x) {
  return {_mm256_srli_epi32(x.v, kBits)};
}
SIMD F exponent(I x) { return {_mm256_cvtepi32_ps(_mm256_srai_epi32(x.v, 23))}; }
SIMD F flip_sign(F x, I word) {
  const __m256 sign = _mm256_castsi256_ps(_mm256_and_si256(word.v, _mm256_set1_epi32(int(0x80000000))));
  return {_mm256_xor_ps(x.v, sign)};
}
SIMD I iota() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
SIMD I load_words(const uint32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
SIMD void store_words(uint32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v); }
SIMD I gather(const uint8_t* p, I offset) {
  return {_mm256_i32gather_epi32(reinterpret_cast<const int*>(p), offset.v, 1)};
}
SIMD F flip_signs(float x, const uint8_t* bits) {
  const __m256i lifted = _mm256_sllv_epi32(_mm256_set1_epi32(*bits), _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24));
  return flip_sign({_mm256_set1_ps(x)}, {lifted});
}
SIMD I shift_left(I x, I count) { return {_mm256_sllv_epi32(x.v, count.v)}; }
template <int kBits>
SIMD I shift_left(I x) {
  return {_mm256_slli_epi32(x.v, kBits)};
}
SIMD I bit_and(I x, I y) { return {_mm256_and_si256(x.v, y.v)}; }
SIMD I swap_halves(I x) {
  const __m128i order = _mm_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return {_mm256_shuffle_epi8(x.v, _mm256_broadcastsi128_si256(order))};
}

SIMD I look_up(const int8_t* table, I index) {
  const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(t), index.v)};
}
SIMD I negate_bytes(I x, I sign) {  // a zero would become of x where the sign is 0
  return {_mm256_sign_epi8(x.v, _mm256_or_si256(sign.v, _mm256_set1_epi8(1)))};
}
SIMD I add_bytes(I x, I y) { return {_mm256_add_epi8(x.v, y.v)}; }
SIMD I sub_bytes(I x, I y) { return {_mm256_sub_epi8(x.v, y.v)}; }
SIMD void store_rows(uint8_t* p, int64_t stride, int64_t, I w, I x, I y, I z) {
  const __m256i a = _mm256_unpacklo_epi32(w.v, x.v), b = _mm256_unpackhi_epi32(w.v, x.v);
  const __m256i c = _mm256_unpacklo_epi32(y.v, z.v), d = _mm256_unpackhi_epi32(y.v, z.v);
  const __m256i rows[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                           _mm256_unpackhi_epi64(b, d)};
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  for (int i = 0; i < 4; ++i, p += stride) {
    const __m256i row = _mm256_shuffle_epi8(rows[i], _mm256_broadcastsi128_si256(order));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(row));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 4 * stride), _mm256_extracti128_si256(row, 1));
  }
}

SIMD Words split(I x) { return {x.v, _mm256_srli_epi64(x.v, 32)}; }
SIMD I join(Words x) { return {_mm256_blend_epi32(x.even, _mm256_slli_epi64(x.odd, 32), 0xAA)}; }
SIMD void mulhilo(uint32_t m, Words x, Words& hi, Words& lo) {
  const __m256i factor = _mm256_set1_epi32(int(m));
  lo = {_mm256_mul_epu32(x.even, factor), _mm256_mul_epu32(x.odd, factor)};
  hi = {_mm256_srli_epi64(lo.even, 32), _mm256_srli_epi64(lo.odd, 32)};
}
SIMD Words xor1(Words a, uint32_t key) {
  const __m256i k = _mm256_set1_epi32(int(key));
  return {_mm256_xor_si256(a.even, k), _mm256_xor_si256(a.odd, k)};
}
SIMD Words xor3(Words a, Words b, uint32_t key) {
  return xor1({_mm256_xor_si256(a.even, b.even), _mm256_xor_si256(a.odd, b.odd)}, key);
}

SIMD F load(const float* p) { return {_mm256_loadu_ps(p)}; }
SIMD F load(const bfloat16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
SIMD F load(const float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }

SIMD F load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}

SIMD F load(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
SIMD F load_e4m3(const uint8_t* p, const float*) {
  const __m128i x = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i h = _mm_and_si128(_mm_slli_epi16(x, 7), _mm_set1_epi16(int16_t(0xbf80)));
  const __m128i most = _mm_set1_epi16(0x3f80);
  const __m256i nan = _mm256_cvtepi16_epi32(_mm_cmpeq_epi16(_mm_and_si128(h, most), most));
  const __m256 f = _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(256.0f));
  return {_mm256_or_ps(f, _mm256_castsi256_ps(nan))};
}
SIMD F load_e5m2(const uint8_t* p, const float*) {
  const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_cvtph_ps(_mm_slli_epi16(x, 8))};
}

struct FloatTable {
  __m256 first, second;
  explicit SIMD FloatTable(const float* p) : first(_mm256_loadu_ps(p)), second(_mm256_loadu_ps(p + 8)) {}
  SIMD F at(I index) const {
    const __m256 x = _mm256_permutevar8x32_ps(first, index.v), y = _mm256_permutevar8x32_ps(second, index.v);
    return {_mm256_blendv_ps(x, y, _mm256_castsi256_ps(_mm256_slli_epi32(index.v, 28)))};
  }
  SIMD void operator()(const uint8_t* codes, bool high_first, float* out) const {
    const __m256i low = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i high = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    for (int i = 0; i < 2; ++i) {
      int word;
      memcpy(&word, codes + 4 * i, 4);
      _mm256_storeu_ps(out + 8 * i, at({_mm256_srlv_epi32(_mm256_set1_epi32(word), high_first ? high : low)}).v);
    }
  }
};
struct HalfTable {
  __m128i low, high;  // bytes
  explicit SIMD HalfTable(const void* p) {
    const __m128i x = _mm_loadu_si128(static_cast<const __m128i*>(p));
    const __m128i y = _mm_loadu_si128(static_cast<const __m128i*>(p) + 1), byte = _mm_set1_epi16(0xff);
    low = _mm_packus_epi16(_mm_and_si128(x, byte), _mm_and_si128(y, byte));
    high = _mm_packus_epi16(_mm_srli_epi16(x, 8), _mm_srli_epi16(y, 8));
  }
  SIMD void operator()(const uint8_t* codes, bool high_first, void* out) const {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)), mask = _mm_set1_epi8(15);
    const __m128i lower = _mm_and_si128(bytes, mask), upper = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    const __m128i index = high_first ? _mm_unpacklo_epi8(upper, lower) : _mm_unpacklo_epi8(lower, upper);
    const __m128i x = _mm_shuffle_epi8(low, index), y = _mm_shuffle_epi8(high, index);
    _mm_storeu_si128(static_cast<__m128i*>(out), _mm_unpacklo_epi8(x, y));
    _mm_storeu_si128(static_cast<__m128i*>(out) + 1, _mm_unpackhi_epi8(x, y));
  }
};

SIMD void store(float* p, F x) { _mm256_storeu_ps(p, x.v); }
SIMD void store(bfloat16* p, F x) {
  const __m256i i = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(i, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(i, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(i, _mm256_set1_epi32(0x400000));
  const __m256i h = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
SIMD void store(float16* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

SIMD void transpose(F (&r)[8]) {
  __m256 t[8], s[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int g = 0; g < 8; g += 4) {
    for (int h = 0; h < 2; ++h) {
      const __m256d a = _mm256_castps_pd(t[g + h]), b = _mm256_castps_pd(t[g + 2 + h]);
      s[g + 2 * h] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      s[g + 2 * h + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {
    r[j].v = _mm256_permute2f128_ps(s[j], s[4 + j], 0x20);
    r[4 + j].v = _mm256_permute2f128_ps(s[j], s[4 + j], 0x31);
  }
}
SIMD float sum(F x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#else  // baseline: loops that any compiler turns into what its target has

constexpr int kWidth = 8;
#define LANES for (int i = 0; i < 8; ++i)

struct F {
  float v[8];
};
struct I {
  uint32_t v[8];
};
struct Words {
  uint32_t v[8];
};

#define MAP(TYPE, EXPRESSION)     \
  TYPE result;                    \
  LANES result.v[i] = EXPRESSION; \
  return result

SIMD F splat(F, float x) { MAP(F, x); }
SIMD I splat(I, uint32_t x) { MAP(I, x); }
SIMD Words splat(Words, uint32_t x) { MAP(Words, x); }
SIMD F add(F x, F y) { MAP(F, x.v[i] + y.v[i]); }
SIMD F sub(F x, F y) { MAP(F, x.v[i] - y.v[i]); }
SIMD F mul(F x, F y) { MAP(F, x.v[i] * y.v[i]); }
SIMD F fma(F x, F y, F z) { MAP(F, x.v[i] * y.v[i] + z.v[i]); }  // two roundings: no such instruction here
SIMD F sqrt(F x) { MAP(F, scalar::sqrt(x.v[i])); }
SIMD F as_float(I x) { MAP(F, scalar::as_float(x.v[i])); }
SIMD I as_int(F x) { MAP(I, scalar::as_int(x.v[i])); }
SIMD I add(I x, I y) { MAP(I, x.v[i] + y.v[i]); }
SIMD I and_or(I x, I mask, I bits) { MAP(I, (x.v[i] & mask.v[i]) | bits.v[i]); }
template <int kBits>
SIMD I shift_right(I x) {
  MAP(I, x.v[i] >> kBits);
}
SIMD F exponent(I x) { MAP(F, scalar::exponent(x.v[i])); }
SIMD F flip_sign(F x, I word) { MAP(F, scalar::flip_sign(x.v[i], word.v[i])); }
SIMD I iota() { MAP(I, uint32_t(i)); }
SIMD I load_words(const uint32_t* p) { MAP(I, p[i]); }
SIMD void store_words(uint32_t* p, I x) { LANES p[i] = x.v[i]; }
SIMD uint32_t word_at(const uint8_t* p) {
  uint32_t word;
  memcpy(&word, p, 4);
  return word;
}
SIMD I gather(const uint8_t* p, I offset) { MAP(I, word_at(p + offset.v[i])); }
SIMD F flip_signs(float x, const uint8_t* bits) { MAP(F, scalar::flip_sign(x, uint32_t(*bits) << (31 - i))); }
SIMD I shift_left(I x, I count) { MAP(I, x.v[i] << count.v[i]); }
template <int kBits>
SIMD I shift_left(I x) {
  MAP(I, x.v[i] << kBits);
}
SIMD I bit_and(I x, I y) { MAP(I, x.v[i] & y.v[i]); }
SIMD I swap_halves(I x) { MAP(I, x.v[i] >> 16 | x.v[i] << 16); }

struct Bytes {
  uint8_t v[32];
};
SIMD Bytes bytes_of(I x) {
  Bytes bytes;
  memcpy(bytes.v, x.v, 32);
  return bytes;
}
template <class Function>
SIMD I map_bytes(I x, I y, Function function) {
  const Bytes a = bytes_of(x), b = bytes_of(y);
  Bytes bytes;
  for (int i = 0; i < 32; ++i) bytes.v[i] = uint8_t(function(a.v[i], b.v[i]));
  I result;
  memcpy(result.v, bytes.v, 32);
  return result;
}
SIMD I look_up(const int8_t* table, I index) {
  return map_bytes(index, index, [=](uint8_t i, uint8_t) { return table[i]; });
}
SIMD I negate_bytes(I x, I sign) {
  return map_bytes(x, sign, [](uint8_t a, uint8_t b) { return b & 0x80 ? -a : a; });
}
SIMD I add_bytes(I x, I y) {
  return map_bytes(x, y, [](uint8_t a, uint8_t b) { return a + b; });
}
SIMD I sub_bytes(I x, I y) {
  return map_bytes(x, y, [](uint8_t a, uint8_t b) { return a - b; });
}
SIMD void store_rows(uint8_t* p, int64_t stride, int64_t, I w, I x, I y, I z) {
  const Bytes words[4] = {bytes_of(w), bytes_of(x), bytes_of(y), bytes_of(z)};
  const int order[4] = {0, 2, 1, 3};
  LANES for (int j = 0; j < 16; ++j) p[i * stride + j] = words[j / 4].v[4 * i + order[j % 4]];
}

SIMD Words split(I x) { MAP(Words, x.v[i]); }
SIMD I join(Words x) { MAP(I, x.v[i]); }
SIMD void mulhilo(uint32_t m, Words x, Words& hi, Words& lo) { LANES scalar::mulhilo(m, x.v[i], hi.v[i], lo.v[i]); }
SIMD Words xor1(Words a, uint32_t key) { MAP(Words, a.v[i] ^ key); }
SIMD Words xor3(Words a, Words b, uint32_t key) { MAP(Words, a.v[i] ^ b.v[i] ^ key); }

template <class T>
SIMD F load(const T* p) {
  MAP(F, to_float(p[i]));
}
SIMD F load_e4m3(const uint8_t* p, const float* table) { MAP(F, table[p[i]]); }
SIMD F load_e5m2(const uint8_t* p, const float* table) { MAP(F, table[p[i]]); }
struct FloatTable {
  const float* table;
  explicit SIMD FloatTable(const float* p) : table(p) {}
  SIMD F at(I index) const { MAP(F, table[index.v[i] & 15]); }
};
template <class T>
SIMD void store(T* p, F x) {
  LANES from_float(x.v[i], p[i]);
}
SIMD void transpose(F (&r)[8]) {
  for (int a = 0; a < 8; ++a)
    for (int b = 0; b < a; ++b) {
      const float t = r[a].v[b];
      r[a].v[b] = r[b].v[a];
      r[b].v[a] = t;
    }
}
SIMD float sum(F x) {
  float s = 0;
  LANES s += x.v[i];
  return s;
}
#undef MAP
#undef LANES

#endif

#if !defined(__AVX512F__)
SIMD void store_bytes(uint8_t* p, int64_t stride, I x) {
  uint32_t words[kWidth];
  store_words(words, x);
  for (int i = 0; i < 4; ++i)
    for (int lane = 0; lane < kWidth; ++lane) p[i * stride + lane] = uint8_t(words[lane] >> 8 * i);
}
// The first n lanes; the others are zero.
template <class T>
SIMD F load(const T* p, int n) {
  T lanes[kWidth] = {};
  memcpy(static_cast<void*>(lanes), p, size_t(n) * sizeof(T));
  return load(lanes);
}
template <class T>
SIMD void store(T* p, F x, int n) {
  T lanes[kWidth];
  store(lanes, x);
  memcpy(static_cast<void*>(p), lanes, size_t(n) * sizeof(T));
}
#endif

}  // namespace FLATLORA_ISA
}  // namespace flatlora
