// Prints a tile of z, drawn with the scalar functions of csrc/common/philox.h: one row a line, as float bits.
// Arguments: kind (1 gaussian, 2 rademacher), seed, stream, sample, first and last row, first and last column.
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

int main(int, char** argv) {
  const auto number = [&](int i) { return strtoull(argv[i], nullptr, 10); };
  const bool gaussian = number(1) == uint64_t(flatlora::Noise::kGaussian);
  const flatlora::PhiloxKey key(number(2));
  for (uint64_t n = number(5); n < number(6); ++n) {
    for (uint64_t k = number(7); k < number(8); ++k) {
      uint32_t c[4] = {uint32_t(k >> 3), uint32_t(gaussian ? n : n >> 4), uint32_t(number(3)), uint32_t(number(4))};
      uint32_t begun[4];
      flatlora::philox_rows_begin(c[0], c[1], c[2], c[3], key, begun);
      flatlora::philox_rounds(begun, key, 3);
      flatlora::philox_rounds(c, key);
      for (int q = 0; q < 4; ++q)
        if (c[q] != begun[q]) return 1;
      float z;
      if (gaussian) {
        float pair[2];
        flatlora::gaussian_pair(c[(k & 7) >> 1], 1.0f, pair[0], pair[1]);
        z = pair[k & 1];
      } else {
        z = c[(n & 15) >> 2] >> (8 * (n & 3) + (k & 7)) & 1 ? -1.0f : 1.0f;
      }
      printf("%u ", flatlora::scalar::as_int(z));
    }
    printf("\n");
  }
}
