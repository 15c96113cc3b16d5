// || W[n] + scaling (lora_B lora_A)[n] ||^2 per row. W is read once; the low-rank part is formed where it is added, so
// that nothing cancels.
#pragma once

#include "packed.h"

namespace flatlora {

// --- Without an adapter: a warp for each row, 16 bytes of it at a time ---

constexpr int kNormThreads = 128;

template <class T>
FLATLORA_DEVICE float square_sum(float sum, const gpu::Words<4>& words) {
  FLATLORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      sum = fmaf(as_float(words.v[i]), as_float(words.v[i]), sum);
    } else {
      float low, high;
      unpack(T{}, words.v[i], low, high);
      sum = fmaf(high, high, fmaf(low, low, sum));
    }
  }
  return sum;
}

template <int lanes>
FLATLORA_DEVICE float sum_over(float x) {
  FLATLORA_UNROLL
  for (int mask = lanes / 2; mask > 0; mask /= 2) x += gpu::shuffle_xor(x, mask);
  return x;
}

template <class T>
FLATLORA_KERNEL(kNormThreads, 8)
row_norms_kernel(RowNormsArgs args) {
  constexpr int kVector = 16 / int(sizeof(T)), kAtOnce = 4;
  const int64_t n = gpu::block() * (kNormThreads / 32) + gpu::warp();
  if (n >= args.N) return;
  const T* row = static_cast<const T*>(args.weight.data) + n * args.weight.row_stride;
  const int64_t vectors = args.K / kVector;
  float sums[kAtOnce] = {};
  int64_t v = gpu::lane();
  FLATLORA_NO_UNROLL
  for (; v + 32 * (kAtOnce - 1) < vectors; v += 32 * kAtOnce) {
    gpu::Words<4> words[kAtOnce];
    FLATLORA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) words[i] = gpu::load_global_once(row + (v + 32 * i) * kVector);
    FLATLORA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) sums[i] = square_sum<T>(sums[i], words[i]);
  }
  FLATLORA_NO_UNROLL
  for (; v < vectors; v += 32) sums[0] = square_sum<T>(sums[0], gpu::load_global_once(row + v * kVector));
  const float sum = sum_over<32>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (gpu::lane() == 0) gpu::store_global(args.out + n, sum);
}

// --- With an adapter, or an irregular W: 16 rows a block, in tiles of 128 columns and 16 steps of the rank ---

constexpr int kNormRows = 16, kNormCols = 128, kNormRank = 16, kNormTileThreads = 256;

struct NormShared {
  static constexpr int kA = 0;                            // (kNormRank, kNormCols) float
  static constexpr int kB = 4 * kNormRank * kNormCols;    // (kNormRank, kNormRows) float
  static constexpr int kBytes = kB + 4 * kNormRank * kNormRows;
};

// Four columns of a row of W. kVector: contiguous, aligned to their size, and K a multiple of 4.
template <class T, bool kVector>
FLATLORA_DEVICE void load_four(float (&w)[4], const T* p, int64_t stride, int64_t valid) {
  FLATLORA_UNROLL
  for (int j = 0; j < 4; ++j) w[j] = 0;
  if constexpr (!kVector) {
    FLATLORA_UNROLL
    for (int j = 0; j < 4; ++j)
      if (j < valid) {
        if constexpr (sizeof(T) == 4)
          w[j] = gpu::load_global<float>(p + j * stride);
        else
          w[j] = to_float(T{gpu::load_global<uint16_t>(p + j * stride)});
      }
  } else if (valid > 0) {
    if constexpr (sizeof(T) == 4) {
      const gpu::Words<4> words = gpu::load_global_once(p);
      FLATLORA_UNROLL
      for (int j = 0; j < 4; ++j) w[j] = as_float(words.v[j]);
    } else {
      const auto words = gpu::load_global<gpu::Words<2>>(p);
      unpack(T{}, words.v[0], w[0], w[1]);
      unpack(T{}, words.v[1], w[2], w[3]);
    }
  }
}

// The same of a packed W, in two rows.
FLATLORA_DEVICE void load_four(float (&w)[2][4], const Packed& packed, int64_t dtype, int64_t n, int64_t last,
                               int64_t k, int64_t valid) {
  FLATLORA_NO_UNROLL
  for (int j = 0; j < 8; ++j) {  // through the last place: addresses of all would fill the registers
    const int64_t row = n + j / 4 < last ? n + j / 4 : last;
    const float v = j % 4 < valid ? rounded_to(dtype, packed_value(packed, row, k + j % 4)) : 0.0f;
    FLATLORA_UNROLL
    for (int i = 0; i < 7; ++i) w[i / 4][i % 4] = w[(i + 1) / 4][(i + 1) % 4];
    w[1][3] = v;
  }
}

// Each thread has two rows and four columns of the tile, which `load` gives for their first row and column.
template <bool kVector, class Load>
FLATLORA_DEVICE void row_norms_tile(const RowNormsArgs& args, Load load) {
  const gpu::Shared shared = gpu::shared_base();
  const int64_t first = gpu::block() * kNormRows, n = first + 2 * gpu::warp();
  const int column = 4 * gpu::lane();
  const float scaling = float(args.scaling);
  float sums[2] = {};
  FLATLORA_NO_UNROLL
  for (int64_t k = 0; k < args.K; k += kNormCols) {
    float w[2][4];
    load(w, n, k + column);
    float product[2][4] = {};
    FLATLORA_NO_UNROLL
    for (int64_t r = 0; r < args.rank; r += kNormRank) {
      constexpr int kOwn = kNormRank * kNormCols / kNormTileThreads;
      float a[kOwn], b[1];
      floats_at(a, args.lora_A, args.A_dtype, [&](int i) {
        const int at = gpu::thread() + i * kNormTileThreads;
        const int64_t row = r + at / kNormCols, col = k + at % kNormCols;
        return row < args.rank && col < args.K ? row * args.A_rank_stride + col * args.A_col_stride : -1;
      });
      floats_at(b, args.lora_B, args.B_dtype, [&](int) {
        const int64_t row = first + gpu::thread() % kNormRows, rank = r + gpu::thread() / kNormRows;
        return row < args.N && rank < args.rank ? row * args.B_row_stride + rank * args.B_rank_stride : -1;
      });
      gpu::sync_threads();  // all have read the step before
      FLATLORA_UNROLL
      for (int i = 0; i < kOwn; ++i)
        gpu::store_shared(shared + NormShared::kA + 4 * (gpu::thread() + i * kNormTileThreads), a[i]);
      gpu::store_shared(shared + NormShared::kB + 4 * gpu::thread(), b[0]);
      gpu::sync_threads();
      FLATLORA_UNROLL
      for (int j = 0; j < kNormRank; ++j) {
        const auto a = gpu::load_shared<gpu::Words<4>>(shared + NormShared::kA + 4 * (j * kNormCols + column));
        const auto b2 =
            gpu::load_shared<gpu::Words<2>>(shared + NormShared::kB + 4 * (j * kNormRows + 2 * gpu::warp()));
        FLATLORA_UNROLL
        for (int i = 0; i < 2; ++i) FLATLORA_UNROLL
        for (int c = 0; c < 4; ++c) product[i][c] = fmaf(as_float(b2.v[i]), as_float(a.v[c]), product[i][c]);
      }
    }
    if (kVector && k + column >= args.K) break;  // an infinite B times the zeros beyond the last column is NaN
    FLATLORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      FLATLORA_UNROLL
      for (int c = 0; c < 4; ++c) {
        if (!kVector && k + column + c >= args.K) continue;
        const float x = fmaf(scaling, product[i][c], w[i][c]);
        sums[i] = fmaf(x, x, sums[i]);
      }
    }
  }
  FLATLORA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float sum = sum_over<32>(sums[i]);
    if (gpu::lane() == 0 && n + i < args.N) gpu::store_global(args.out + n + i, sum);
  }
}

template <class T, bool kVector>
FLATLORA_KERNEL(kNormTileThreads, 2)
row_norms_tile_kernel(RowNormsArgs args) {
  row_norms_tile<kVector>(args, [&args](float (&w)[2][4], int64_t n, int64_t k) {
    FLATLORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t row = n + i < args.N ? n + i : args.N - 1;
      const T* p = static_cast<const T*>(args.weight.data) + row * args.weight.row_stride + k * args.weight.col_stride;
      load_four<T, kVector>(w[i], p, args.weight.col_stride, args.K - k);
    }
  });
}

// Of all types.
FLATLORA_KERNEL(kNormTileThreads, 2)
row_norms_packed_kernel(const FLATLORA_GRID_CONSTANT RowNormsArgs args, const FLATLORA_GRID_CONSTANT Packed packed) {
  row_norms_tile<false>(args, [&](float (&w)[2][4], int64_t n, int64_t k) {
    FLATLORA_UNROLL
    for (int i = 0; i < 8; ++i) w[i / 4][i % 4] = 0.0f;
    load_four(w, packed, args.dtype, n, args.N - 1, k, args.K - k);
  });
}

}  // namespace flatlora
