// The noise of docs/internals/noise.md: Philox4x32-10 and what becomes of its words.
//
// Plain C++17 for g++, nvcc and hipcc. The functions are templates over a vector type, so that a scalar, a CUDA
// thread and a SIMD register run the same operations in the same order and give the same bits. A type takes part
// by overloading the few primitives that `namespace scalar` below shows. Multiply-adds are always explicit: build
// with contraction off.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define FLATLORA_INLINE __host__ __device__ __forceinline__
#else
#define FLATLORA_INLINE inline __attribute__((always_inline))
#endif

namespace flatlora {

enum class Noise : int64_t { kNone = 0, kGaussian = 1, kRademacher = 2, kNearGaussian = 3, kHadamard = 4 };

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

namespace scalar {

FLATLORA_INLINE void mulhilo(uint32_t m, uint32_t x, uint32_t& hi, uint32_t& lo) {
  const uint64_t product = uint64_t(m) * x;
  hi = uint32_t(product >> 32);
  lo = uint32_t(product);
}
FLATLORA_INLINE uint32_t xor1(uint32_t a, uint32_t key) { return a ^ key; }
FLATLORA_INLINE uint32_t xor3(uint32_t a, uint32_t b, uint32_t key) { return a ^ b ^ key; }

FLATLORA_INLINE float as_float(uint32_t x) {
  float f;
  memcpy(&f, &x, 4);
  return f;
}
FLATLORA_INLINE uint32_t as_int(float x) {
  uint32_t i;
  memcpy(&i, &x, 4);
  return i;
}
FLATLORA_INLINE uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
FLATLORA_INLINE uint32_t add(uint32_t x, uint32_t y) { return x + y; }
template <int kBits>
FLATLORA_INLINE uint32_t shift_right(uint32_t x) {
  return x >> kBits;
}
// The signed exponent field, as a float.
FLATLORA_INLINE float exponent(uint32_t x) { return float(int32_t(x) >> 23); }
FLATLORA_INLINE uint32_t splat(uint32_t, uint32_t value) { return value; }
FLATLORA_INLINE float splat(float, float value) { return value; }
FLATLORA_INLINE float add(float x, float y) { return x + y; }
FLATLORA_INLINE float mul(float x, float y) { return x * y; }
FLATLORA_INLINE float fma(float x, float y, float z) { return fmaf(x, y, z); }
FLATLORA_INLINE float sqrt(float x) { return sqrtf(x); }
// x with its sign flipped where the top bit of `word` is set.
FLATLORA_INLINE float flip_sign(float x, uint32_t word) { return as_float(as_int(x) ^ (word & 0x80000000u)); }

}  // namespace scalar

using scalar::add;
using scalar::and_or;
using scalar::as_float;
using scalar::as_int;
using scalar::exponent;
using scalar::flip_sign;
using scalar::fma;
using scalar::mul;
using scalar::mulhilo;
using scalar::shift_right;
using scalar::splat;
using scalar::sqrt;
using scalar::xor1;
using scalar::xor3;

// The keys of the ten rounds. SIMD code reads them from memory, where a broadcast operand is free.
struct PhiloxKey {
  uint32_t k0[10], k1[10];
  FLATLORA_INLINE explicit PhiloxKey(uint64_t seed) {
    for (uint32_t round = 0; round < 10; ++round) {
      k0[round] = uint32_t(seed) + round * kPhiloxW0;
      k1[round] = uint32_t(seed >> 32) + round * kPhiloxW1;
    }
  }
};

// Rounds [first, 10) in place; U is a word or a vector of words.
template <class U>
FLATLORA_INLINE void philox_rounds(U (&c)[4], const PhiloxKey& key, int first = 0) {
  for (int round = first; round < 10; ++round) {
    U hi0, lo0, hi1, lo1;
    mulhilo(kPhiloxM0, c[0], hi0, lo0);
    mulhilo(kPhiloxM1, c[2], hi1, lo1);
    c[0] = xor3(hi1, c[1], key.k0[round]);
    c[1] = lo1;
    c[2] = xor3(hi0, c[3], key.k1[round]);
    c[3] = lo0;
  }
}

// The four words of one counter.
FLATLORA_INLINE void philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, const PhiloxKey& key,
                            uint32_t (&c)[4]) {
  c[0] = c0;
  c[1] = c1;
  c[2] = c2;
  c[3] = c3;
  philox_rounds(c, key);
}

// Rounds [0, 3) for counters that differ in c1 alone (many rows, one block of columns): what is uniform in them is
// computed once, as scalars.
template <class U>
FLATLORA_INLINE void philox_rows_begin(uint32_t c0, U c1, uint32_t c2, uint32_t c3, const PhiloxKey& key, U (&c)[4]) {
  uint32_t high0, high1, low0, low1, next0, next1;
  U high, low;
  mulhilo(kPhiloxM0, c0, high0, low0);
  mulhilo(kPhiloxM1, c2, high1, low1);
  mulhilo(kPhiloxM0, xor1(c1, high1 ^ key.k0[0]), high, low);
  mulhilo(kPhiloxM1, high0 ^ c3 ^ key.k1[0], high1, next1);
  const U third = xor1(high, low0 ^ key.k1[1]);
  mulhilo(kPhiloxM0, high1 ^ low1 ^ key.k0[1], high0, next0);
  mulhilo(kPhiloxM1, third, high, c[1]);
  c[0] = xor1(high, next1 ^ key.k0[2]);
  c[2] = xor1(low, high0 ^ key.k1[2]);
  c[3] = splat(c1, next0);
}

template <class F>
FLATLORA_INLINE F poly(F x, const float* c, int degree) {
  F y = splat(x, c[degree]);
  for (int i = degree - 1; i >= 0; --i) y = fma(y, x, splat(x, c[i]));
  return y;
}

// Box-Muller on one word: `scale` times the two deviates of columns 2q (cosine) and 2q + 1 (sine).
//
// The polynomials are minimax fits; over all 2^16 radii and 2^16 angles |z - z_exact| < 1.4e-6.
template <class F, class I>
FLATLORA_INLINE void gaussian_pair(I word, F scale, F& even, F& odd) {
  // -2 ln(1 + f) / f on [sqrt(1/2) - 1, sqrt(2) - 1]
  constexpr float kLog[7] = {-2.00000191f,  1.00002229f,  -0.666290164f, 0.498194903f,
                             -0.409926623f, 0.373357028f, -0.237921908f};
  // -sin(pi/2 t) / t and cos(pi/2 t) in t^2, on [0, 1]
  constexpr float kSin[5] = {-1.57079625f, 0.645963371f, -0.079688482f, 0.00467223302f, -0.000150822641f};
  constexpr float kCos[5] = {0.99999994f, -1.23369825f, 0.253650755f, -0.0208106283f, 0.000858190644f};

  // U = (u + 0.5) / 2^16: u becomes the low mantissa bits of 128 + u / 2^16, and the subtraction is exact.
  const F uniform =
      add(as_float(and_or(word, splat(word, 0xffffu), splat(word, 0x43000000u))), splat(scale, -127.99999237060547f));
  // U = 2^e m with m in [sqrt(1/2), sqrt(2)), so that U near 1 has e = 0 and nothing cancels.
  const I bits = add(as_int(uniform), splat(word, 0u - 0x3f3504f3u));
  const F f = add(as_float(add(and_or(bits, splat(word, 0x7fffffu), splat(word, 0u)), splat(word, 0x3f3504f3u))),
                  splat(scale, -1.0f));
  const F squared = fma(exponent(bits), splat(scale, -1.38629436f), mul(f, poly(f, kLog, 6)));
  const F radius = mul(flip_sign(sqrt(squared), word), scale);

  // theta = pi (top bit) + pi/2 (t + 1): the top bit flips both signs, the other 15 give t in [-1, 1).
  const F t = add(as_float(and_or(shift_right<16>(word), splat(word, 0x7fffu), splat(word, 0x44000000u))),
                  splat(scale, -513.0f));
  const F t2 = mul(t, t);
  even = mul(radius, mul(t, poly(t2, kSin, 4)));
  odd = mul(radius, poly(t2, kCos, 4));
}

// The standard deviation of the integers of near_gaussian.
constexpr float kNearGaussianDeviation = 25.787593841552734f;  // sqrt(665)

// One of the 16 levels with its sign, from the low or high half (h = 0, 1) of a word: two bits of mantissa, two of
// exponent.
FLATLORA_INLINE int near_gaussian_level(uint32_t word, uint32_t h) {
  const uint32_t half = word >> (16 * h), mantissa = half >> 5 & 3, exponent = half >> 7 & 3;
  const int magnitude = int(exponent == 0 ? mantissa : (mantissa | 4) << (exponent - 1));
  return half & 0x8000 ? -magnitude : magnitude;
}

// The integers of a unit that one word of its left and of its right call make: rows n and n + 8, each of its left and
// right column.
FLATLORA_INLINE void near_gaussian_unit(uint32_t left, uint32_t right, uint32_t h, int (&m)[4]) {
  const int a = near_gaussian_level(left, h), b = near_gaussian_level(left >> 5 | left << 27, h);
  const int c = near_gaussian_level(right, h), d = near_gaussian_level(right >> 5 | right << 27, h);
  m[0] = a + b + c + d;
  m[1] = a + b - c - d;
  m[2] = a - b + c - d;
  m[3] = a - b - c + d;
}

// Of hadamard: the first counter's offset for the signs of rows and of columns.
constexpr uint32_t kHadamardRows = 0x80000000u, kHadamardCols = 0xC0000000u;

FLATLORA_INLINE constexpr uint32_t parity(uint32_t x) {
  x ^= x >> 16;
  x ^= x >> 8;
  x ^= x >> 4;
  return 0x6996u >> (x & 15) & 1;
}

// The low `bits` bits of x, which has no others, in reverse order.
FLATLORA_INLINE uint32_t reverse_bits(uint32_t x, int bits) {
  x = (x & 0x55555555) << 1 | (x >> 1 & 0x55555555);
  x = (x & 0x33333333) << 2 | (x >> 2 & 0x33333333);
  x = (x & 0x0f0f0f0f) << 4 | (x >> 4 & 0x0f0f0f0f);
  x = (x & 0x00ff00ff) << 8 | (x >> 8 & 0x00ff00ff);
  return bits == 0 ? 0 : (x << 16 | x >> 16) >> (32 - bits);
}

}  // namespace flatlora
