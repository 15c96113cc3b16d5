// Prints a tile of z, drawn with the scalar functions of csrc/common/philox.h: one row a line, as float bits.
// Of near_gaussian it prints the integers. Arguments: kind (enum Noise), seed, stream, sample, first and last row,
// first and last column, tile_bits.
#include <cstdio>
#include <cstdlib>

#include "../../csrc/common/philox.h"

#if defined(__CUDACC__) || defined(__HIPCC__)
// The header must also compile for a device.
__global__ void tile_kernel(uint64_t seed, float scale, float* z) {
  uint32_t c[4] = {threadIdx.x, blockIdx.x, 0, 0};
  flatlora::philox_rounds(c, flatlora::PhiloxKey(seed));
  for (int q = 0; q < 4; ++q)
    flatlora::gaussian_pair(c[q], scale, z[8 * threadIdx.x + 2 * q], z[8 * threadIdx.x + 2 * q + 1]);
}
#endif

using namespace flatlora;

namespace {

uint32_t bit_of_call(uint32_t c0, uint32_t c1, uint32_t stream, uint32_t sample, const PhiloxKey& key, uint32_t i) {
  uint32_t c[4];
  philox(c0 + (i >> 7), c1, stream, sample, key, c);
  return c[i >> 5 & 3] >> (i & 31) & 1;
}

}  // namespace

int main(int, char** argv) {
  const auto number = [&](int i) { return strtoull(argv[i], nullptr, 10); };
  const Noise kind = Noise(number(1));
  const PhiloxKey key(number(2));
  const uint32_t stream = uint32_t(number(3)), sample = uint32_t(number(4));
  const int bits = int(number(9));
  for (uint64_t row = number(5); row < number(6); ++row) {
    for (uint64_t col = number(7); col < number(8); ++col) {
      const uint32_t n = uint32_t(row), k = uint32_t(col);
      float z;
      if (kind == Noise::kHadamard) {
        const uint32_t tile = (1u << bits) - 1;
        z = parity(reverse_bits(n & tile, bits) & k) ^ bit_of_call(kHadamardRows, k >> bits, stream, sample, key, n) ^
                    bit_of_call(kHadamardCols, n >> bits, stream, sample, key, k)
                ? -1.0f
                : 1.0f;
      } else if (kind == Noise::kNearGaussian) {
        uint32_t left[4], right[4];
        const uint32_t c1 = 8 * (n >> 4) + (n & 7), q = (k & 7) >> 1;
        philox(k >> 3 & ~1u, c1, stream, sample, key, left);
        philox(k >> 3 | 1u, c1, stream, sample, key, right);
        int m[4];
        near_gaussian_unit(left[q], right[q], k & 1, m);
        z = float(m[(n >> 3 & 1) * 2 + (k >> 3 & 1)]);
      } else {
        uint32_t c[4] = {k >> 3, kind == Noise::kGaussian ? n : n >> 4, stream, sample};
        uint32_t begun[4];
        philox_rows_begin(c[0], c[1], c[2], c[3], key, begun);
        philox_rounds(begun, key, 3);
        philox_rounds(c, key);
        for (int q = 0; q < 4; ++q)
          if (c[q] != begun[q]) return 1;
        if (kind == Noise::kGaussian) {
          float pair[2];
          gaussian_pair(c[(k & 7) >> 1], 1.0f, pair[0], pair[1]);
          z = pair[k & 1];
        } else {
          z = c[(n & 15) >> 2] >> (8 * (n & 3) + (k & 7)) & 1 ? -1.0f : 1.0f;
        }
      }
      printf("%u ", scalar::as_int(z));
    }
    printf("\n");
  }
}
