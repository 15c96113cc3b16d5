// W + eps, or eps, in one pass; of a packed W also W alone.
#pragma once

#include "packed.h"

namespace flatlora {

constexpr int kPerturbThreads = 256;
constexpr int kPerturbSteps = 4;

// Drops the first element and appends another.
template <class T>
FLATLORA_DEVICE void push(Chunk<T>& w, uint32_t bits) {
  constexpr int kLast = 2 * int(sizeof(T)) - 1;
  FLATLORA_UNROLL
  for (int i = 0; i < kLast; ++i) w.v[i] = sizeof(T) == 2 ? w.v[i] >> 16 | w.v[i + 1] << 16 : w.v[i + 1];
  w.v[kLast] = sizeof(T) == 2 ? w.v[kLast] >> 16 | bits << 16 : bits;
}

// A chunk of contiguous columns, aligned to 16 bytes.
template <class T>
FLATLORA_DEVICE Chunk<T> load_chunk(const char* p) {
  Chunk<T> w;
  FLATLORA_UNROLL
  for (int half = 0; half < int(sizeof(T)) / 2; ++half) {
    const gpu::Words<4> words = gpu::load_global_once(p + 16 * half);
    FLATLORA_UNROLL
    for (int i = 0; i < 4; ++i) w.v[4 * half + i] = words.v[i];
  }
  return w;
}
template <class T>
FLATLORA_DEVICE void store_chunk(char* p, const Chunk<T>& w) {
  FLATLORA_UNROLL
  for (int half = 0; half < int(sizeof(T)) / 2; ++half) {
    gpu::Words<4> words;
    FLATLORA_UNROLL
    for (int i = 0; i < 4; ++i) words.v[i] = w.v[4 * half + i];
    gpu::store_global(p + 16 * half, words);
  }
}

// The first `valid` of any columns. Element by element through the last place; unrolled, the addresses alone would fill
// the registers.
template <class T>
FLATLORA_DEVICE Chunk<T> gather_chunk(const T* p, int64_t stride, int64_t valid) {
  Chunk<T> w = {};
  FLATLORA_NO_UNROLL
  for (int j = 0; j < 8; ++j) push<T>(w, j < valid ? gpu::load_global<Bits<T>>(p + j * stride) : 0);
  return w;
}
template <class T>
FLATLORA_DEVICE void scatter_chunk(T* p, int64_t stride, int64_t valid, const Chunk<T>& w) {
  Chunk<T> rest = w;
  FLATLORA_NO_UNROLL
  for (int j = 0; j < 8 && j < valid; ++j) {
    gpu::store_global(p + j * stride, Bits<T>(rest.v[0]));
    push<T>(rest, 0);
  }
}

// A warp has `kPatches` patches below each other and kPerturbSteps times 32 of them side by side.
template <Noise kind, bool kVector>
struct PerturbShape {
  using Own = Patch<kind>;
  // All 16 rows that a call of rademacher serves.
  static constexpr int kPatches = kind == Noise::kRademacher && kVector ? 4 : 1;
  static constexpr int kStep = 32 * 8 * Own::kCols;  // columns
  FLATLORA_INLINE static constexpr int64_t spans(int64_t K) {
    return (K + kPerturbSteps * kStep - 1) / (kPerturbSteps * kStep);
  }
  FLATLORA_INLINE static constexpr int64_t items(int64_t N, int64_t K) {
    return (Own::kUnit ? (N + 15) / 16 * 8 : (N + 4 * kPatches - 1) / (4 * kPatches)) * spans(K);
  }
  FLATLORA_INLINE static constexpr int64_t first_row(int64_t item, int64_t K) {
    const int64_t index = item / spans(K);
    return Own::kUnit ? index / 8 * 16 + index % 8 : index * (4 * kPatches);
  }
};

struct PerturbJob {
  PerturbArgs args;
  uint32_t from_bytes, to_bytes;  // from row to row, where chunks are whole
};

// Where the chunks of a thread lie: `read` begins to load one, of which `value` makes the values.
template <class T, bool kVector>
struct PerturbMemory;

// Whole chunks, and less than 2^32 bytes from row to row.
template <class T>
struct PerturbMemory<T, true> {
  using Raw = Chunk<T>;
  const char* from;
  char* to;
  uint32_t from_bytes, to_bytes;  // from row to row

  FLATLORA_DEVICE PerturbMemory(const PerturbJob& job, int64_t n, int64_t k)
      : from(static_cast<const char*>(job.args.weight.data) + n * job.from_bytes + k * int64_t(sizeof(T))),
        to(static_cast<char*>(job.args.out) + n * job.to_bytes + k * int64_t(sizeof(T))),
        from_bytes(job.from_bytes),
        to_bytes(job.to_bytes) {}
  FLATLORA_DEVICE static bool has_weight(const PerturbJob& job) { return job.args.weight.data != nullptr; }
  FLATLORA_DEVICE Raw read(uint32_t row, int col, int) const {
    return load_chunk<T>(from + uint64_t(from_bytes) * row + col * int(sizeof(T)));
  }
  FLATLORA_DEVICE Chunk<T> value(const Raw& w) const { return w; }
  FLATLORA_DEVICE void store(uint32_t row, int col, int, const Chunk<T>& w) const {
    store_chunk<T>(to + uint64_t(to_bytes) * row + col * int(sizeof(T)), w);
  }
  FLATLORA_DEVICE void advance(int columns) {
    from += columns * int(sizeof(T));
    to += columns * int(sizeof(T));
  }
};

template <class T>
struct PerturbMemory<T, false> {
  using Raw = Chunk<T>;
  const T* from;
  T* to;
  int64_t from_row, from_col, to_row, to_col;

  FLATLORA_DEVICE PerturbMemory(const PerturbJob& job, int64_t n, int64_t k)
      : from(static_cast<const T*>(job.args.weight.data) + n * job.args.weight.row_stride +
             k * job.args.weight.col_stride),
        to(static_cast<T*>(job.args.out) + n * job.args.out_row_stride + k * job.args.out_col_stride),
        from_row(job.args.weight.row_stride),
        from_col(job.args.weight.col_stride),
        to_row(job.args.out_row_stride),
        to_col(job.args.out_col_stride) {}
  FLATLORA_DEVICE static bool has_weight(const PerturbJob& job) { return job.args.weight.data != nullptr; }
  FLATLORA_DEVICE Raw read(uint32_t row, int col, int left) const {
    return gather_chunk<T>(from + row * from_row + col * from_col, from_col, left);
  }
  FLATLORA_DEVICE Chunk<T> value(const Raw& w) const { return w; }
  FLATLORA_DEVICE void store(uint32_t row, int col, int left, const Chunk<T>& w) const {
    scatter_chunk<T>(to + row * to_row + col * to_col, to_col, left, w);
  }
  FLATLORA_DEVICE void advance(int columns) {
    from += columns * from_col;
    to += columns * to_col;
  }
};

// Of packed rows, whole chunks as above.
struct PackedRowsJob : PerturbJob {
  PackedRows packed;
};
template <class T, int kBits, int kScaleBytes>
struct PackedRowsMemory {
  using Raw = PackedChunk;
  const PackedRows& packed;
  gpu::Shared table;
  float offset;
  const uint8_t* from;
  char* to;
  uint32_t from_bytes, to_bytes, row, col;

  FLATLORA_DEVICE PackedRowsMemory(const PackedRowsJob& job, int64_t n, int64_t k)
      : packed(job.packed),
        table(gpu::shared_base()),
        offset(kScaleBytes == 1 ? scale_offset(job.packed) : 0.0f),
        from(job.packed.codes + n * job.packed.row_bytes + k / 8 * kBits),
        to(static_cast<char*>(job.args.out) + n * job.to_bytes + k * int64_t(sizeof(T))),
        from_bytes(uint32_t(job.packed.row_bytes)),
        to_bytes(job.to_bytes),
        row(uint32_t(n)),
        col(uint32_t(k)) {}
  FLATLORA_DEVICE static bool has_weight(const PackedRowsJob&) { return true; }
  FLATLORA_DEVICE Raw read(uint32_t down, int right, int) const {
    return load_packed<kBits, kScaleBytes>(packed, from + uint64_t(from_bytes) * down + right / 8 * kBits,
                                           scale_row(packed, row + down) + scale_col(packed, col + uint32_t(right)));
  }
  FLATLORA_DEVICE Chunk<T> value(const Raw& c) const {
    return decoded<T, kBits, true>(c, packed, table, scale_of(c, packed, kScaleBytes == 1, offset));
  }
  FLATLORA_DEVICE void store(uint32_t down, int right, int, const Chunk<T>& w) const {
    store_chunk<T>(to + uint64_t(to_bytes) * down + right * int(sizeof(T)), w);
  }
  FLATLORA_DEVICE void advance(int columns) {
    from += columns / 8 * kBits;
    to += columns * int(sizeof(T));
    col += uint32_t(columns);
  }
};

// Of any layout.
struct PackedJob : PerturbJob {
  Packed packed;
};
template <class T>
struct PackedMemory {
  using Raw = Chunk<T>;
  const Packed& packed;
  T* to;
  int64_t to_row, to_col, row, col;

  FLATLORA_DEVICE PackedMemory(const PackedJob& job, int64_t n, int64_t k)
      : packed(job.packed),
        to(static_cast<T*>(job.args.out) + n * job.args.out_row_stride + k * job.args.out_col_stride),
        to_row(job.args.out_row_stride),
        to_col(job.args.out_col_stride),
        row(n),
        col(k) {}
  FLATLORA_DEVICE static bool has_weight(const PackedJob&) { return true; }
  FLATLORA_DEVICE Raw read(uint32_t down, int right, int left) const {
    Chunk<T> w = {};
    FLATLORA_NO_UNROLL
    for (int j = 0; j < 8; ++j)
      push<T>(w, j < left ? bits_of<T>(packed_value(packed, row + down, col + right + j)) : 0);
    return w;
  }
  FLATLORA_DEVICE Chunk<T> value(const Raw& w) const { return w; }
  FLATLORA_DEVICE void store(uint32_t down, int right, int left, const Chunk<T>& w) const {
    scatter_chunk<T>(to + down * to_row + right * to_col, to_col, left, w);
  }
  FLATLORA_DEVICE void advance(int columns) {
    to += columns * to_col;
    col += columns;
  }
};

// What a thread does. kVector: chunks are whole, and rows and columns begin where the noise's patches may.
template <class T, Noise kind, bool kVector, class Memory, class Job>
FLATLORA_DEVICE void perturb_rows(const Job& job) {
  const PerturbArgs& args = job.args;
  constexpr bool kDraws = kind != Noise::kNone;
  using Shape = PerturbShape<kind, kVector>;
  using Own = Patch<kind>;
  constexpr int kPatches = Shape::kPatches, kMost = 1 << 30;
  const int64_t item = gpu::block() * (kPerturbThreads / 32) + gpu::warp(), n = Shape::first_row(item, args.K);
  const int64_t k = item % Shape::spans(args.K) * (kPerturbSteps * Shape::kStep) + gpu::lane() * (8 * Own::kCols);
  if (n >= args.N) return;
  const int rows_left = args.N - n < kMost ? int(args.N - n) : kMost;
  const int rows_from = Memory::has_weight(job) ? rows_left : 0;
  int left = args.K - k < kMost ? int(args.K - k) : kMost;  // columns
  constexpr int kColumns = kPerturbSteps * Shape::kStep;
  const int last = left > kColumns ? left - kColumns : 0;
  Draw draw = {};
  if constexpr (kDraws) draw = draw_of(args.noise, 0);
  uint32_t block = draw.first_block + uint32_t(k / 8);
  draw.first_block = 0;  // blocks are those of the whole weight
  const auto row_at = [](int p, int i) { return 4 * p + Own::row(i); };
  Factor<kind, T> factor[kPatches][4];
  FLATLORA_UNROLL
  for (int i = 0; kDraws && i < 4 * kPatches; ++i) {
    const int row = row_at(i / 4, i % 4);
    const float* scale = args.noise.scale + (n + row) * args.noise.scale_stride;
    factor[i / 4][i % 4] =
        row < rows_left ? factor_of<kind, T>(draw, gpu::load_global<float>(scale)) : Factor<kind, T>(0);
  }
  Memory memory(job, n, k);
  const int bits = int(args.noise.tile_bits);
  const uint32_t row = draw.first_row + uint32_t(n);
  PatchRows<kind, T> rows;
  WalshRows walsh;
  if constexpr (kDraws && kind != Noise::kHadamard)
    set_rows(rows, draw, uint32_t(n));
  else if constexpr (kDraws && kVector)
    walsh = walsh_rows(draw, row, bits, 8 * block);
  FLATLORA_NO_UNROLL
  while (left > last) {
    PatchBlocks<kind> blocks;
    uint32_t signs[1][4];
    if constexpr (kDraws && kind != Noise::kHadamard) blocks = set_blocks<kind>(draw, block);
    if constexpr (kPatches > 1) philox(draw, rows.key, blocks.key[0], signs);
    FLATLORA_UNROLL
    for (int p = 0; p < kPatches; ++p) {
      typename Memory::Raw raw[4] = {};
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int col = 8 * Own::col(i);
        if (row_at(p, i) < rows_from && (col == 0 || col < left))
          raw[i] = memory.read(uint32_t(row_at(p, i)), col, left - col);
      }
      Chunk<T> w[4];
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        w[i] = memory.value(raw[i]);
        if constexpr (kDraws) rows.factor[i] = factor[p][i];
      }
      if constexpr (!kDraws) {
      } else if constexpr (kind == Noise::kHadamard) {
        const uint32_t column = 8 * block;
        uint32_t word = 0;
        if constexpr (kVector) {
          word = walsh_signs(draw, walsh, bits, column);
        } else {
          FLATLORA_NO_UNROLL
          for (uint32_t i = 0; i < 4; ++i) word |= walsh_signs(draw, row + i, bits, column) << 8 * i;
        }
        add_signs<kind, T>(w, word, rows.factor);
      } else if constexpr (kPatches > 1) {
        add_signs<kind, T>(w, signs[0][p], rows.factor);
      } else if (kVector || kind == Noise::kGaussian || (kind == Noise::kNearGaussian && begins_whole(args.noise))) {
        perturb_patch<kind, T>(w, draw, rows, blocks);
      } else {
        perturb_patch<kind, T, !kVector>(w, draw, rows, blocks);
      }
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int col = 8 * Own::col(i);
        if (row_at(p, i) < rows_left && (col == 0 || col < left))
          memory.store(uint32_t(row_at(p, i)), col, left - col, w[i]);
      }
    }
    memory.advance(Shape::kStep);
    block += Shape::kStep / 8;
    left -= Shape::kStep;
  }
}

template <class T, Noise kind, bool kVector>
FLATLORA_KERNEL(kPerturbThreads, (sizeof(T) == 4 && kind == Noise::kRademacher ? 1 : 2))
perturb_kernel(PerturbJob job) {
  perturb_rows<T, kind, kVector, PerturbMemory<T, kVector>>(job);
}

template <class T, Noise kind, int kBits, int kScaleBytes>
FLATLORA_KERNEL(kPerturbThreads, (kind == Noise::kRademacher ? 1 : 2))
perturb_packed_rows_kernel(const FLATLORA_GRID_CONSTANT PackedRowsJob job) {
  load_table<kBits>(job.packed, gpu::shared_base(), kPerturbThreads);
  gpu::sync_threads();
  perturb_rows<T, kind, true, PackedRowsMemory<T, kBits, kScaleBytes>>(job);
}

template <class T, Noise kind>
FLATLORA_KERNEL(kPerturbThreads, (sizeof(T) == 4 ? 1 : 2))
perturb_packed_kernel(const FLATLORA_GRID_CONSTANT PackedJob job) {
  perturb_rows<T, kind, false, PackedMemory<T>>(job);
}

}  // namespace flatlora
