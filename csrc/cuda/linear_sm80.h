// y = a P^T + scaling u L^T + bias with P = W + eps (or its transpose), for sm_80 and later.
//
// A block owns a tile of y. Tiles of `a` and of W come by asynchronous copies through a ring of stages. While the
// tensor cores multiply stage i, each thread adds noise to the patch of W that it copied to stage i + 1: nobody else
// touches them before the barrier that ends the step, so the pass needs none of its own. Where W is packed, codes and
// scales come to the places of the values and become these in registers, before the noise.
#pragma once

#include "configs.h"
#include "linear_job.h"
#include "packed.h"

namespace flatlora {

// Where the 16-byte piece `piece` of a row lies in it. Eight neighbouring rows, and eight neighbouring pieces, and four
// pieces two apart of rows r and r + 4, all fall into different banks.
FLATLORA_DEVICE uint32_t swizzle(uint32_t row) { return (row & 3) << 1 | (row >> 2 & 1); }
FLATLORA_DEVICE uint32_t place(uint32_t row_bytes, uint32_t row, uint32_t piece) {
  return row * row_bytes + ((piece ^ (piece >> 3 & 1) ^ swizzle(row)) << 4);
}

struct PackedLinearJob : LinearJob {
  PackedRows packed;
};

// kApart: a stage has a third tile, of what rounding W + eps leaves, by which `a` is multiplied as well.
// kBits: of a code where W is packed, else 0.
template <class T, bool kInputGrad, Noise kNoise, int kConfig, bool kApart = false, int kBits = 0>
struct LinearTile {
  using Job = std::conditional_t<kBits == 0, LinearJob, PackedLinearJob>;
  static constexpr Tile kTile = kTiles[kConfig];
  static constexpr int kElement = sizeof(T), kThreads = kTile.threads(), kStages = kTile.stages;
  static constexpr int kPerPiece = 16 / kElement, kChunkPieces = kElement / 2;  // a chunk is 8 elements
  static constexpr int kStep = 2 * kPerPiece, kSteps = kTile.k / kStep;         // of one mma
  static constexpr uint32_t kRowBytes = kTile.k * kElement;                     // of `a` and of the adapter
  static constexpr int kWRows = kInputGrad ? kTile.k : kTile.n, kWCols = kInputGrad ? kTile.n : kTile.k;
  static constexpr uint32_t kWRowBytes = kWCols * kElement;
  using Own = Patch<kNoise>;
  static constexpr int kWPatches = kWCols / (8 * Own::kCols);  // side by side
  static constexpr uint32_t kABytes = kTile.m * kRowBytes, kWBytes = kWRows * kWRowBytes;
  static constexpr uint32_t kStageBytes = kABytes + kWBytes * (kApart ? 2 : 1);
  static constexpr uint32_t kLastSlot = (kStages - 1) * kStageBytes;  // a slot is where a stage begins
  static constexpr int kWarpM = kTile.m / kTile.warps_m, kWarpN = kTile.n / kTile.warps_n;
  static constexpr int kMI = kWarpM / 16, kNI = kWarpN / 8;
  static constexpr int kAPieces = kRowBytes / 16, kARowStep = kThreads / kAPieces, kACopies = kTile.m / kARowStep;
  static_assert(kWRows / Own::kRows * kWPatches == kThreads, "each thread perturbs a patch");

  const Job& job;
  gpu::Shared stages;
  int64_t first_m, last_m, first_out;
  int64_t begin, end;  // of the contraction, in this part
  // What this thread copies: pieces of rows of `a`, and a patch of W, by chunks. Where from: for the next step, what
  // all threads share and the thread's offsets; where to: in a stage.
  uint32_t a_piece, a_row, w_chunk, w_row;
  const char *a_from, *w_from;
  uint32_t a_offset[kACopies], w_offset[4];
  uint32_t scale_index[kBits == 0 ? 1 : 4];  // forward: of each chunk's row; input grad: of its columns
  uint32_t scale_low;  // forward: the low bytes of these, which cost less to keep than to find again
  float scale_offset;
  uint32_t a_place, w_place;
  Draw draw;
  PatchRows<kNoise, T> rows;
  const float* scale_from;  // input gradient: of the next step, of which `next_scale` is
  float next_scale[4];
  float acc[kMI][kNI][4];
  float stage_sum[kElement == 4 ? kMI : 1][kElement == 4 ? kNI : 1][4];

  FLATLORA_DEVICE explicit LinearTile(const Job& j) : job(j) {}

  FLATLORA_DEVICE gpu::Shared a_stage(uint32_t slot) const { return stages + slot; }
  FLATLORA_DEVICE gpu::Shared w_stage(uint32_t slot) const { return a_stage(slot) + kABytes; }
  // A piece of chunk i.
  FLATLORA_DEVICE gpu::Shared w_at(gpu::Shared stage, int i, int piece) const {
    const int row = Own::row(i);
    piece += Own::col(i) * kChunkPieces;
    return stage + (w_place ^ (swizzle(uint32_t(row)) << 4 ^ uint32_t(piece << 4))) + uint32_t(row) * kWRowBytes;
  }

  // Of the tile of W, for the `index`-th of those that have the same columns. Where a unit's pieces are two apart,
  // eight lanes have rows r and r + 4.
  FLATLORA_DEVICE static uint32_t first_row(uint32_t index) {
    if constexpr (!Own::kUnit) return index * 4;
    const uint32_t within = kElement == 2 ? (index & 1) << 2 | (index >> 1 & 3) : index & 7;
    return index / 8 * 16 + within;
  }

  // The tile of this block.
  FLATLORA_DEVICE void begin_tile() {
    constexpr uint32_t kGroup = 8;  // tiles of rows that take turns on one tile of W, for the L2 cache
    const uint32_t tiles_m = uint32_t(job.tiles_m), tiles_n = uint32_t(job.tiles_n), block = uint32_t(gpu::block());
    const uint32_t tile = block % (tiles_m * tiles_n), first = tile / (kGroup * tiles_n) * kGroup;
    const uint32_t height = tiles_m - first < kGroup ? tiles_m - first : kGroup, within = tile % (kGroup * tiles_n);
    const uint32_t tile_m = first + within % height, tiles_per_sample = uint32_t(job.tiles_per_sample);
    // So that the compiler knows that all threads have the same.
    const int part = gpu::uniform(int(block / (tiles_m * tiles_n))), tile_n = gpu::uniform(int(within / height));
    const int sample = gpu::uniform(int(tile_m / tiles_per_sample));
    first_m = sample * job.rows_per_sample + gpu::uniform(int(tile_m % tiles_per_sample)) * int64_t(kTile.m);
    last_m = (sample + 1) * job.rows_per_sample;  // a tile sees the noise of one sample
    first_out = tile_n * int64_t(kTile.n);
    begin = part * job.steps_per_part * kTile.k;
    end = smaller(begin + job.steps_per_part * kTile.k, job.length);
    stages = gpu::shared_base();
    draw = draw_of(job.args.noise, sample);

    const uint32_t thread = uint32_t(gpu::thread());
    a_piece = thread % kAPieces;
    a_row = thread / kAPieces;
    w_chunk = thread % kWPatches * Own::kCols;
    w_row = first_row(thread / kWPatches);
    a_place = place(kRowBytes, a_row, a_piece);
    w_place = place(kWRowBytes, w_row, w_chunk * kChunkPieces);
    const LinearArgs& args = job.args;
    const int64_t w_row_stride = args.weight.row_stride;
    const int64_t w_first = kInputGrad ? begin * w_row_stride + first_out : first_out * w_row_stride + begin;
    a_from = static_cast<const char*>(args.a) + (first_m * args.a_row_stride + begin) * kElement;
    if constexpr (kBits == 0) {
      w_from = static_cast<const char*>(args.weight.data) + w_first * kElement;
    } else {
      const int64_t row = kInputGrad ? begin : first_out, col = kInputGrad ? first_out : begin;
      w_from = reinterpret_cast<const char*>(job.packed.codes) + row * job.packed.row_bytes + col / 8 * kBits;
    }
    scale_from = args.noise.scale + (begin + w_row) * args.noise.scale_stride;
    const uint32_t a_stride = uint32_t(args.a_row_stride) * kElement, w_stride = uint32_t(w_row_stride) * kElement;
    // Rows beyond the edge are those of the last one again; they are not stored.
    FLATLORA_UNROLL
    for (int i = 0; i < kACopies; ++i)
      a_offset[i] = uint32_t(smaller(a_row + i * kARowStep, last_m - first_m - 1)) * a_stride + a_piece * 16;
    FLATLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int64_t row = kInputGrad ? w_row + Own::row(i) : smaller(w_row + Own::row(i), job.outputs - first_out - 1);
      if constexpr (kBits == 0) {
        w_offset[i] = uint32_t(row) * w_stride + (w_chunk + Own::col(i)) * 8 * kElement;
      } else {
        w_offset[i] = uint32_t(row) * uint32_t(job.packed.row_bytes) + (w_chunk + Own::col(i)) * kBits;
        scale_index[i] = kInputGrad ? scale_col(job.packed, uint32_t(first_out) + (w_chunk + Own::col(i)) * 8)
                                    : scale_row(job.packed, uint32_t(first_out) + uint32_t(row));
      }
    }
    if constexpr (kBits == 4) {
      scale_offset = flatlora::scale_offset(job.packed);
      scale_low = 0;
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) scale_low |= (scale_index[i] & 0xff) << 8 * i;
    }
    if constexpr (!kInputGrad) {
      set_rows(rows, draw, uint32_t(first_out) + w_row);
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t n = first_out + w_row + Own::row(i);
        rows.factor[i] = n < job.outputs ? factor_of<kNoise, T>(draw, scale_at(n)) : Factor<kNoise, T>(0);
      }
    }
    FLATLORA_UNROLL
    for (int i = 0; i < kMI; ++i) {
      FLATLORA_UNROLL
      for (int j = 0; j < kNI; ++j) {
        FLATLORA_UNROLL
        for (int k = 0; k < 4; ++k) {
          acc[i][j][k] = 0.0f;
          if constexpr (kElement == 4) stage_sum[i][j][k] = 0.0f;
        }
      }
    }
  }

  FLATLORA_DEVICE float scale_at(int64_t n) const {
    return gpu::load_global<float>(job.args.noise.scale + n * job.args.noise.scale_stride);
  }

  // noise_scale of the rows of W at `at` of the contraction, early enough for `set_step`.
  template <bool kEdge>
  FLATLORA_DEVICE void load_scales(int64_t at) {
    if constexpr (kInputGrad) {
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        if constexpr (kEdge) {
          const int64_t n = at + w_row + Own::row(i);
          next_scale[i] = n < end ? scale_at(n) : 0.0f;
        } else {
          next_scale[i] = gpu::load_global<float>(scale_from + Own::row(i));
        }
      }
      scale_from += kTile.k * job.args.noise.scale_stride;
    }
  }
  FLATLORA_DEVICE void set_step(int64_t at) {
    if constexpr (kInputGrad) {
      set_rows(rows, draw, uint32_t(at) + w_row);
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) rows.factor[i] = factor_of<kNoise, T>(draw, next_scale[i]);
    }
  }
  FLATLORA_DEVICE PatchBlocks<kNoise> blocks_at(int64_t at) const {
    return set_blocks<kNoise>(draw, (uint32_t(kInputGrad ? first_out : at) >> 3) + w_chunk);
  }

  // --- Copies ---

  // Columns `at` to at + kTile.k of the contraction, each step once and in order. kEdge: zeros beyond `end`, no access
  // beyond a row.
  template <bool kEdge>
  FLATLORA_DEVICE void copy(int64_t at, uint32_t slot) {
    if (kEdge && kConfig == kAny && !job.copies) {
      gather(at, slot);
    } else if constexpr (kEdge) {
      copy_edge(at, slot);
    } else {
      FLATLORA_UNROLL
      for (int i = 0; i < kACopies; ++i)
        gpu::cp_async<16>(a_stage(slot) + a_place + i * kARowStep * kRowBytes, a_from + a_offset[i]);
      if constexpr (kBits == 0) {
        FLATLORA_UNROLL
        for (int i = 0; i < 4; ++i) {
          FLATLORA_UNROLL
          for (int p = 0; p < kChunkPieces; ++p)
            gpu::cp_async<16>(w_at(w_stage(slot), i, p), w_from + w_offset[i] + 16 * p);
        }
      } else {
        copy_packed<false>(at, slot);
      }
    }
    gpu::cp_async_commit();
    a_from += kTile.k * kElement;
    if constexpr (kBits == 0)
      w_from += kTile.k * kElement * (kInputGrad ? job.args.weight.row_stride : 1);
    else
      w_from += kInputGrad ? kTile.k * job.packed.row_bytes : kTile.k / 8 * kBits;
  }

  // --- Of packed rows ---

  // The index of chunk i's scale, in the step at `at`.
  FLATLORA_DEVICE uint32_t scale_at(uint32_t at, int i) const {
    if constexpr (kInputGrad)
      return scale_row(job.packed, at + w_row + uint32_t(Own::row(i))) + scale_index[i];
    else
      return scale_index[i] + scale_col(job.packed, at + (w_chunk + uint32_t(Own::col(i))) * 8);
  }
  // The place of a chunk gets its codes, and from its third word on the word that has its scale, and the scale's own.
  template <bool kEdge>
  FLATLORA_DEVICE void copy_packed(int64_t at, uint32_t slot) {
    const PackedRows& p = job.packed;
    FLATLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const gpu::Shared to = w_at(w_stage(slot), i, 0);
      const char* from = w_from + w_offset[i];
      uint32_t index = scale_at(uint32_t(at), i);
      int valid = 4;
      bool inside = true;
      if constexpr (kEdge) {
        const int64_t col = (w_chunk + Own::col(i)) * 8;
        inside = kInputGrad ? first_out + col < job.outputs && at + w_row + Own::row(i) < end : at + col < end;
        if (!inside) {
          from = reinterpret_cast<const char*>(p.codes);
          index = 0;
        }
      }
      const uint32_t byte = kBits == 8 ? 4 * index : index << p.scale_shift & ~3u;
      if constexpr (kEdge) valid = inside ? int(smaller((int64_t(p.scales) << p.scale_shift) - byte, 4)) : 0;
      gpu::cp_async<kBits>(to, from, inside ? kBits : 0);
      gpu::cp_async<4>(to + 8, p.scale + byte, valid);
      if (kBits == 4 && p.nested != nullptr)
        gpu::cp_async<4>(to + 12, p.nested + (index >> p.nested_shift), inside ? 4 : 0);
    }
  }
  FLATLORA_DEVICE gpu::Shared table() const { return stages + kStages * kStageBytes; }
  // What was copied for chunk i becomes its values.
  FLATLORA_DEVICE void decode(Chunk<T>& w, uint32_t at, int i) const {
    const PackedRows& p = job.packed;
    float scale = as_float(w.v[2]);
    if (kBits == 4 && p.scale_shift == 0) {
      const uint32_t col = scale_col(p, at + (w_chunk + uint32_t(Own::col(i))) * 8);
      const uint32_t index = kInputGrad ? scale_at(at, i) : (scale_low >> 8 * i) + col;
      const uint32_t byte = gpu::rotate_right(w.v[2], int(8 * index));
      const PackedChunk c = {{}, byte, p.nested == nullptr ? 1.0f : as_float(w.v[3])};
      scale = scale_of(c, p, true, scale_offset);
    }
    w = decoded<T, kBits, false>({{w.v[0], w.v[1]}, 0, 0.0f}, p, table(), scale);
  }

  FLATLORA_DEVICE void copy_edge(int64_t at, uint32_t slot) {
    const char* const nothing = static_cast<const char*>(kBits == 0 ? job.args.weight.data : job.args.a);
    const int a_valid = bytes_before(end, at + a_piece * kPerPiece);
    FLATLORA_UNROLL
    for (int i = 0; i < kACopies; ++i)
      gpu::cp_async<16>(a_stage(slot) + a_place + i * kARowStep * kRowBytes, a_valid ? a_from + a_offset[i] : nothing,
                        a_valid);
    if constexpr (kBits == 0)
      copy_weights_edge(at, slot);
    else
      copy_packed<true>(at, slot);
  }
  FLATLORA_DEVICE void copy_weights_edge(int64_t at, uint32_t slot) {
    const char* const nothing = static_cast<const char*>(job.args.weight.data);
    FLATLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      FLATLORA_UNROLL
      for (int p = 0; p < kChunkPieces; ++p) {
        const int64_t col = (w_chunk + Own::col(i)) * 8 + p * kPerPiece;
        int valid = kInputGrad ? bytes_before(job.outputs, first_out + col) : bytes_before(end, at + col);
        if (kInputGrad && at + w_row + Own::row(i) >= end) valid = 0;
        gpu::cp_async<16>(w_at(w_stage(slot), i, p), valid ? w_from + w_offset[i] + 16 * p : nothing, valid);
      }
    }
  }
  // Bytes of the piece at column `at` that lie before column `last`.
  FLATLORA_DEVICE int bytes_before(int64_t last, int64_t at) const {
    return int(smaller(last - at > 0 ? last - at : 0, kPerPiece)) * kElement;
  }

  // The same element by element, for any strides and alignment.
  FLATLORA_DEVICE void gather(int64_t at, uint32_t slot) {
    const LinearArgs& args = job.args;
    FLATLORA_NO_UNROLL
    for (int i = 0; i < kACopies; ++i) {
      const uint32_t row = a_row + uint32_t(i * kARowStep);
      gather_piece(a_stage(slot) + a_place + uint32_t(i * kARowStep) * kRowBytes, args.a, args.a_row_stride,
                   args.a_col_stride, first_m + row, last_m, at + a_piece * kPerPiece, end);
    }
    if constexpr (kBits == 0)
      gather_weights(at, slot);
    else
      copy_packed<true>(at, slot);
  }
  FLATLORA_DEVICE void gather_weights(int64_t at, uint32_t slot) {
    const LinearArgs& args = job.args;
    const int64_t first_row = kInputGrad ? at : first_out, first_col = kInputGrad ? first_out : at;
    FLATLORA_NO_UNROLL
    for (int i = 0; i < 4; ++i) {
      FLATLORA_NO_UNROLL
      for (int p = 0; p < kChunkPieces; ++p)
        gather_piece(w_at(w_stage(slot), i, p), args.weight.data, args.weight.row_stride, args.weight.col_stride,
                     first_row + w_row + Own::row(i), kInputGrad ? end : job.outputs,
                     first_col + (w_chunk + Own::col(i)) * 8 + p * kPerPiece, kInputGrad ? job.outputs : end);
    }
  }
  FLATLORA_DEVICE void gather_piece(gpu::Shared to, const void* data, int64_t row_stride, int64_t col_stride,
                                    int64_t row, int64_t rows, int64_t col, int64_t cols) {
    gpu::Words<4> w;
    FLATLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      w.v[i] = 0;
      FLATLORA_UNROLL
      for (int j = 0; j < kPerPiece / 4; ++j) {
        const int64_t c = col + i * (kPerPiece / 4) + j;
        if (row >= rows || c >= cols) continue;
        const char* const from = static_cast<const char*>(data) + (row * row_stride + c * col_stride) * kElement;
        if constexpr (kElement == 4) {
          w.v[i] = gpu::load_global<uint32_t>(from);
        } else {
          w.v[i] |= uint32_t(gpu::load_global<uint16_t>(from)) << 16 * j;
        }
      }
    }
    gpu::store_shared(to, w);
  }

  // --- Noise ---

  FLATLORA_DEVICE Chunk<T> load_chunk(gpu::Shared stage, int i) const {
    Chunk<T> w;
    FLATLORA_UNROLL
    for (int p = 0; p < kChunkPieces; ++p) {
      const gpu::Words<4> words = gpu::load_shared<gpu::Words<4>>(w_at(stage, i, p));
      FLATLORA_UNROLL
      for (int j = 0; j < 4; ++j) w.v[4 * p + j] = words.v[j];
    }
    return w;
  }
  FLATLORA_DEVICE void store_chunk(gpu::Shared stage, int i, const Chunk<T>& w) const {
    FLATLORA_UNROLL
    for (int p = 0; p < kChunkPieces; ++p)
      gpu::store_shared(w_at(stage, i, p), gpu::Words<4>{{w.v[4 * p], w.v[4 * p + 1], w.v[4 * p + 2], w.v[4 * p + 3]}});
  }

  // The noise of one stage in as many turns as a stage has steps, between which the products of another one stand.
  // Stores wait for a turn, so that no load of operands stands behind them.
  struct Pass {
    gpu::Shared stage;
    PatchBlocks<kNoise> blocks;
    Chunk<T> w[4], rest[kApart ? 4 : 1];
    uint32_t at;  // of the contraction
  };
  static constexpr int kStride = kSteps / 4;  // turns for a chunk

  FLATLORA_DEVICE void store_row(const Pass& pass, int i) const {
    store_chunk(pass.stage, i, pass.w[i]);
    if constexpr (kApart) store_chunk(pass.stage + kWBytes, i, pass.rest[i]);
  }
  FLATLORA_DEVICE void noise_loads(Pass& pass, int turn) {
    if (turn % kStride != 0) return;
    const int row = turn / kStride;
    if constexpr (kNoise == Noise::kGaussian) {
      if (row > 0) store_row(pass, row - 1);
      if (row < 4) pass.w[row] = load_chunk(pass.stage, row);
    } else {
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (row == 0) pass.w[i] = load_chunk(pass.stage, i);
        if (row == 3) store_row(pass, i);
      }
    }
  }
  template <bool kEdge>
  FLATLORA_DEVICE void noise_turn(Pass& pass, int turn) {
    if (turn % kStride != 0) return;
    const int row = turn / kStride;
    if constexpr (kBits != 0) {
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i)
        if (kNoise == Noise::kGaussian ? i == row : row == 1) decode(pass.w[i], pass.at, i);
    }
    if constexpr (kNoise == Noise::kGaussian) {
      const RowKey key[1] = {rows.key[row]};
      uint32_t words[1][4];
      philox(draw, key, pass.blocks.key[0], words);
      add_gaussian<T, kApart>(pass.w[row], words[0], rows.factor[row], pass.rest + (kApart ? row : 0));
    } else if (row == 1) {
      if (kEdge && kConfig == kAny && job.any) {
        perturb_patch<kNoise, T, true, kApart>(pass.w, draw, rows, pass.blocks, pass.rest);
      } else {
        perturb_patch<kNoise, T, false, kApart>(pass.w, draw, rows, pass.blocks, pass.rest);
      }
    }
  }
  FLATLORA_DEVICE void all_noise(Pass& pass) {
    FLATLORA_UNROLL
    for (int turn = 0; turn < kSteps; ++turn) {
      noise_loads(pass, turn);
      noise_turn<true>(pass, turn);
    }
    noise_loads(pass, kSteps);
  }
  // Columns beyond the contraction have got noise, too.
  FLATLORA_DEVICE void clear_tail(gpu::Shared stage, int64_t at) {
    FLATLORA_NO_UNROLL
    for (int i = 0; i < 32 && !kInputGrad && at + kTile.k > job.length; ++i) {
      const int chunk = i / 8, j = i % 8;
      if (at + (w_chunk + Own::col(chunk)) * 8 + j < job.length) continue;
      const gpu::Shared p = w_at(stage, chunk, j / kPerPiece) + uint32_t(j % kPerPiece * kElement);
      if constexpr (kElement == 4) {
        gpu::store_shared(p, 0u);
      } else {
        gpu::store_shared(p, uint16_t(0));
        if constexpr (kApart) gpu::store_shared(p + kWBytes, uint16_t(0));
      }
    }
  }

  // --- Products ---

  struct Fragments {
    uint32_t a[kMI][4], b[kNI][2];
  };

  // kTransposed: the stage has a row for each step of the contraction, else for each output. What a lane adds to the
  // slot does not change from stage to stage.
  template <bool kTransposed>
  FLATLORA_DEVICE void load_fragments(Fragments& f, uint32_t slot, int step) const {
    const uint32_t lane = uint32_t(gpu::lane()), warp_m = uint32_t(gpu::warp()) / kTile.warps_n * kWarpM;
    const uint32_t step_place = uint32_t(2 * step ^ (2 * step >> 3 & 1)) << 4;
    const gpu::Shared a_tile = stages + (warp_m + (lane & 15)) * kRowBytes;
    const gpu::Shared a_lane = a_tile + ((lane >> 4 ^ swizzle(lane & 7)) << 4);
    FLATLORA_UNROLL
    for (int i = 0; i < kMI; ++i) gpu::ldmatrix(f.a[i], (a_lane ^ step_place) + slot + i * 16 * kRowBytes);
    load_weights<kTransposed>(f, slot, step);
  }
  template <bool kTransposed>
  FLATLORA_DEVICE void load_weights(Fragments& f, uint32_t slot, int step) const {
    const uint32_t lane = uint32_t(gpu::lane()), warp_n = uint32_t(gpu::warp()) % kTile.warps_n * kWarpN;
    const uint32_t step_place = uint32_t(2 * step ^ (2 * step >> 3 & 1)) << 4;
    if constexpr (!kTransposed) {
      const gpu::Shared b_tile = stages + (warp_n + (lane & 7) + (lane >> 4) * 8) * kRowBytes;
      const gpu::Shared b_lane = b_tile + (((lane >> 3 & 1) ^ swizzle(lane & 7)) << 4);
      FLATLORA_UNROLL
      for (int j = 0; j < kNI; j += 2) {
        uint32_t r[4];
        gpu::ldmatrix(r, (b_lane ^ step_place) + slot + (kABytes + j * 8 * kRowBytes));
        f.b[j][0] = r[0], f.b[j][1] = r[1], f.b[j + 1][0] = r[2], f.b[j + 1][1] = r[3];
      }
    } else if constexpr (kElement == 2) {
      const uint32_t first = warp_n / 8;
      const gpu::Shared b_lane =
          stages + (lane & 15) * kWRowBytes + ((first ^ (first >> 3 & 1) ^ lane >> 4 ^ swizzle(lane & 7)) << 4);
      FLATLORA_UNROLL
      for (int j = 0; j < kNI; j += 2) {
        uint32_t r[4];
        gpu::ldmatrix_trans(r, (b_lane ^ uint32_t(j << 4)) + slot + (kABytes + step * 16 * kWRowBytes));
        f.b[j][0] = r[0], f.b[j][1] = r[1], f.b[j + 1][0] = r[2], f.b[j + 1][1] = r[3];
      }
    } else {
      FLATLORA_UNROLL
      for (int j = 0; j < kNI; ++j) {
        FLATLORA_UNROLL
        for (int h = 0; h < 2; ++h) {
          const uint32_t col = warp_n + j * 8 + lane / 4;
          f.b[j][h] = gpu::load_shared<uint32_t>(w_stage(slot) + col % 4 * 4 +
                                                 place(kWRowBytes, step * 8 + h * 4 + lane % 4, col / 4));
        }
      }
    }
  }

  FLATLORA_DEVICE void multiply(Fragments& f) {
    if constexpr (kElement == 2) {
      FLATLORA_UNROLL
      for (int i = 0; i < kMI; ++i) {
        FLATLORA_UNROLL
        for (int j = 0; j < kNI; ++j) gpu::mma(acc[i][j], f.a[i], f.b[j], T{});
      }
    } else {
      if (job.tf32) {
        FLATLORA_UNROLL
        for (int i = 0; i < 4 * kMI; ++i) f.a[i / 4][i % 4] = gpu::to_tf32(as_float(f.a[i / 4][i % 4]));
        FLATLORA_UNROLL
        for (int j = 0; j < 2 * kNI; ++j) f.b[j / 2][j % 2] = gpu::to_tf32(as_float(f.b[j / 2][j % 2]));
        FLATLORA_UNROLL
        for (int i = 0; i < kMI; ++i) {
          FLATLORA_UNROLL
          for (int j = 0; j < kNI; ++j) gpu::mma_tf32(stage_sum[i][j], f.a[i], f.b[j]);
        }
      } else {
        Fragments small, last;
        FLATLORA_UNROLL
        for (int i = 0; i < 4 * kMI; ++i) split(f.a[i / 4][i % 4], small.a[i / 4][i % 4], last.a[i / 4][i % 4]);
        FLATLORA_UNROLL
        for (int j = 0; j < 2 * kNI; ++j) split(f.b[j / 2][j % 2], small.b[j / 2][j % 2], last.b[j / 2][j % 2]);
        FLATLORA_UNROLL
        for (int i = 0; i < kMI; ++i) {
          FLATLORA_UNROLL
          for (int j = 0; j < kNI; ++j) multiply_exactly(stage_sum[i][j], i, j, f, small, last);
        }
      }
    }
  }
  // Two tf32 numbers hold a float but for its last bit. Sums grow outside of the tensor cores, which do not round them
  // to nearest. Infinities have no small part.
  FLATLORA_DEVICE void multiply_exactly(float (&to)[4], int i, int j, const Fragments& large, const Fragments& small,
                                        const Fragments& last) const {
    float product[4] = {};
    gpu::mma_tf32(product, last.a[i], large.b[j]);
    gpu::mma_tf32(product, large.a[i], last.b[j]);
    gpu::mma_tf32(product, small.a[i], large.b[j]);
    gpu::mma_tf32(product, large.a[i], small.b[j]);
    FLATLORA_UNROLL
    for (int k = 0; k < 4; ++k) product[k] = fabsf(product[k]) < INFINITY ? product[k] : 0.0f;
    gpu::mma_tf32(product, large.a[i], large.b[j]);
    FLATLORA_UNROLL
    for (int k = 0; k < 4; ++k) to[k] += product[k];
  }
  // float32: long sums are sums of the stages' sums.
  FLATLORA_DEVICE void end_stage() {
    if constexpr (kElement == 4) {
      FLATLORA_UNROLL
      for (int i = 0; i < kMI; ++i) {
        FLATLORA_UNROLL
        for (int j = 0; j < kNI; ++j) {
          FLATLORA_UNROLL
          for (int k = 0; k < 4; ++k) {
            acc[i][j][k] += stage_sum[i][j][k];
            stage_sum[i][j][k] = 0.0f;
          }
        }
      }
    }
  }
  FLATLORA_DEVICE void split(uint32_t& x, uint32_t& small, uint32_t& last) const {
    const float whole = as_float(x);
    x = gpu::to_tf32(whole);
    const float rest = whole - as_float(x);
    small = gpu::to_tf32(rest);
    last = as_int(rest - as_float(small));
  }

  // scaling u L^T, through the stage `slot`.
  FLATLORA_DEVICE void adapter(uint32_t slot) {
    const LinearArgs& args = job.args;
    FLATLORA_NO_UNROLL
    for (int64_t at = 0; at < args.rank; at += kTile.k) {
      const int pieces = int(smaller((args.rank - at + kStep - 1) / kStep * 2, kAPieces));
      FLATLORA_NO_UNROLL
      for (int i = gpu::thread(); i < kTile.m * pieces; i += kThreads) {
        const uint32_t row = uint32_t(i / pieces), piece = uint32_t(i % pieces);
        gather_piece(a_stage(slot) + place(kRowBytes, row, piece), args.u, args.rank, 1, first_m + row, last_m,
                     at + piece * kPerPiece, args.rank);
      }
      FLATLORA_NO_UNROLL
      for (int i = gpu::thread(); i < kTile.n * pieces; i += kThreads) {
        const uint32_t row = uint32_t(i / pieces), piece = uint32_t(i % pieces);
        const int64_t out = first_out + row;
        float x[kPerPiece];
        floats_at(x, args.lora, args.lora_dtype, [&](int j) {
          const int64_t r = at + piece * kPerPiece + j;
          return out < job.outputs && r < args.rank ? out * args.lora_out_stride + r * args.lora_rank_stride : -1;
        });
        gpu::Words<4> w;
        FLATLORA_UNROLL
        for (int j = 0; j < 4; ++j) {
          if constexpr (kElement == 4) {
            w.v[j] = as_int(x[j]);
          } else {
            w.v[j] = pack(T{}, x[2 * j], x[2 * j + 1]);
          }
        }
        gpu::store_shared(w_stage(slot) + place(kRowBytes, row, piece), w);
      }
      gpu::sync_threads();
      FLATLORA_NO_UNROLL
      for (int step = 0; 2 * step < pieces; ++step) {
        Fragments f;
        load_fragments<false>(f, slot, step);
        multiply(f);
      }
      end_stage();
      gpu::sync_threads();
    }
    FLATLORA_UNROLL
    for (int i = 0; i < kMI; ++i) {
      FLATLORA_UNROLL
      for (int j = 0; j < kNI; ++j) {
        FLATLORA_UNROLL
        for (int k = 0; k < 4; ++k) acc[i][j][k] *= float(args.scaling);
      }
    }
  }

  FLATLORA_DEVICE void store_pair(void* y, int64_t at, bool pair, float even, float odd, bool two) const {
    if constexpr (kElement == 4) {
      float* const p = static_cast<float*>(y) + at;
      if (pair) {
        gpu::store_global(p, gpu::Words<2>{{as_int(even), as_int(odd)}});
      } else {
        gpu::store_global(p, even);
        if (two) gpu::store_global(p + 1, odd);
      }
    } else {
      uint16_t* const p = static_cast<uint16_t*>(y) + at;
      const uint32_t w = pack(T{}, even, odd);
      if (pair) {
        gpu::store_global(p, w);
      } else {
        gpu::store_global(p, uint16_t(w));
        if (two) gpu::store_global(p + 1, uint16_t(w >> 16));
      }
    }
  }

  FLATLORA_DEVICE void store() const {
    const LinearArgs& args = job.args;
    const int lane = gpu::lane(), warp = gpu::warp();
    const int64_t row = first_m + warp / kTile.warps_n * kWarpM + lane / 4;
    const int64_t col = first_out + warp % kTile.warps_n * kWarpN + lane % 4 * 2;
    const int64_t part = begin / (job.steps_per_part * kTile.k);
    const bool even_rows = job.outputs % 2 == 0;
    FLATLORA_UNROLL
    for (int j = 0; j < kNI; ++j) {
      const int64_t c = col + j * 8;
      if (c >= job.outputs) continue;
      const bool two = c + 1 < job.outputs;
      float bias[2] = {0.0f, 0.0f};
      if (args.bias != nullptr && job.parts == 1) {
        bias[0] = float_at(args.bias, args.bias_dtype, c * args.bias_stride);
        if (two) bias[1] = float_at(args.bias, args.bias_dtype, (c + 1) * args.bias_stride);
      }
      FLATLORA_UNROLL
      for (int i = 0; i < kMI; ++i) {
        FLATLORA_UNROLL
        for (int h = 0; h < 2; ++h) {
          const int64_t r = row + i * 16 + h * 8;
          if (r >= last_m) continue;
          const float even = acc[i][j][2 * h] + bias[0], odd = acc[i][j][2 * h + 1] + bias[1];
          if (job.parts == 1) {
            store_pair(args.y, r * job.outputs + c, even_rows, even, odd, two);
          } else {
            float* const p = job.partial + (part * args.M + r) * job.outputs + c;
            if (even_rows) {
              gpu::store_global(p, gpu::Words<2>{{as_int(even), as_int(odd)}});
            } else {
              gpu::store_global(p, even);
              if (two) gpu::store_global(p + 1, odd);
            }
          }
        }
      }
    }
  }

  // Multiplies what `slot` holds of the contraction from `at` on and makes the next stage ready. kEdge: where any of
  // the steps under way is not a whole one; elsewhere the low half of `at` is enough.
  template <bool kEdge>
  FLATLORA_DEVICE void step(int64_t at, uint32_t& slot) {
    const uint32_t next = slot == kLastSlot ? 0 : slot + kStageBytes, free = slot == 0 ? kLastSlot : slot - kStageBytes;
    gpu::cp_async_wait<kStages - 3>();
    if (!kEdge || at + (kStages - 1) * kTile.k < end) {
      copy<kEdge>(at + (kStages - 1) * kTile.k, free);
    } else {
      gpu::cp_async_commit();  // of nothing, so that waits count the same
    }

    Pass pass;
    const bool more = !kEdge || at + kTile.k < end;  // a step whose noise is to be drawn
    pass.stage = w_stage(next);
    pass.blocks = blocks_at(at + kTile.k);
    pass.at = uint32_t(at + kTile.k);
    set_step(at + kTile.k);
    load_scales<kEdge>(at + 2 * kTile.k);
    FLATLORA_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      Fragments f;
      load_fragments<kInputGrad>(f, slot, i);
      if (more) noise_loads(pass, i);
      multiply(f);
      if constexpr (kApart) {
        load_weights<kInputGrad>(f, slot + kWBytes, i);
        multiply(f);
      }
      if (more) noise_turn<kEdge>(pass, i);
    }
    if (more) noise_loads(pass, kSteps);
    end_stage();
    if (kEdge && more) clear_tail(pass.stage, at + kTile.k);
    gpu::sync_threads();
    slot = next;
  }

  FLATLORA_DEVICE void run() {
    begin_tile();
    FLATLORA_NO_UNROLL
    for (int i = 0; i < kStages - 1; ++i) copy<true>(begin + i * kTile.k, uint32_t(i) * kStageBytes);
    load_scales<true>(begin);
    if (begin == 0 && job.args.rank > 0) adapter(kLastSlot);

    if constexpr (kBits != 0) {
      load_table<kBits>(job.packed, table(), kThreads);
      gpu::sync_threads();
    }
    Pass pass;
    gpu::cp_async_wait<kStages - 2>();
    pass.stage = w_stage(0);
    pass.blocks = blocks_at(begin);
    pass.at = uint32_t(begin);
    set_step(begin);
    load_scales<true>(begin + kTile.k);
    all_noise(pass);
    clear_tail(pass.stage, begin);
    gpu::sync_threads();

    // Steps that copy, draw for and multiply whole tiles.
    const bool whole = job.copies && (!kInputGrad || first_out + kTile.n <= job.outputs);
    const int steps = int((end - begin) / kTile.k) - (kStages - 1), whole_steps = whole && steps > 0 ? steps : 0;
    uint32_t slot = 0;
    FLATLORA_NO_UNROLL
    for (int i = 0; i < whole_steps; ++i) step<false>(uint32_t(begin) + uint32_t(i * kTile.k), slot);
    FLATLORA_NO_UNROLL
    for (int64_t at = begin + int64_t(whole_steps) * kTile.k; at < end; at += kTile.k) step<true>(at, slot);
    store();
  }
};

template <class T, bool kInputGrad, Noise kNoise, int kConfig, bool kApart = false>
FLATLORA_KERNEL(kTiles[kConfig].threads(), kTiles[kConfig].blocks)
linear_sm80_kernel(const FLATLORA_GRID_CONSTANT LinearJob job) {
  LinearTile<T, kInputGrad, kNoise, kConfig, kApart>(job).run();
}

template <class T, bool kInputGrad, Noise kNoise, int kConfig, bool kApart, int kBits>
FLATLORA_KERNEL(kTiles[kConfig].threads(), kTiles[kConfig].blocks)
linear_packed_sm80_kernel(const FLATLORA_GRID_CONSTANT PackedLinearJob job) {
  LinearTile<T, kInputGrad, kNoise, kConfig, kApart, kBits>(job).run();
}

// Of one type, in the file named after it.
template <class T>
gpu::Error launch_linear_sm80(Config config, const gpu::Launch& how, const LinearJob& job);

template <class T, bool kInputGrad, Noise kNoise>
gpu::Error launch_config(Config config, const gpu::Launch& how, const LinearJob& job) {
  if constexpr (sizeof(T) == 2) {
    if (job.args.split_noise && config == kFewRows)
      return gpu::launch(linear_sm80_kernel<T, kInputGrad, kNoise, kFewRows, true>, how, job);
    if (job.args.split_noise) return gpu::launch(linear_sm80_kernel<T, kInputGrad, kNoise, kAny, true>, how, job);
    if (config == kLarge) return gpu::launch(linear_sm80_kernel<T, kInputGrad, kNoise, kLarge>, how, job);
    if (config == kMiddle) return gpu::launch(linear_sm80_kernel<T, kInputGrad, kNoise, kMiddle>, how, job);
  }
  if (config == kFewRows) return gpu::launch(linear_sm80_kernel<T, kInputGrad, kNoise, kFewRows>, how, job);
  return gpu::launch(linear_sm80_kernel<T, kInputGrad, kNoise, kAny>, how, job);
}

template <class T, bool kInputGrad>
gpu::Error launch_noise(Config config, const gpu::Launch& how, const LinearJob& job) {
  switch (static_cast<Noise>(job.args.noise.kind)) {
    case Noise::kGaussian: return launch_config<T, kInputGrad, Noise::kGaussian>(config, how, job);
    case Noise::kNearGaussian: return launch_config<T, kInputGrad, Noise::kNearGaussian>(config, how, job);
    default: return launch_config<T, kInputGrad, Noise::kRademacher>(config, how, job);
  }
}

#define FLATLORA_LINEAR_SM80(T)                                                                                      \
  template <>                                                                                                        \
  gpu::Error launch_linear_sm80<T>(Config config, const gpu::Launch& how, const LinearJob& job) {                    \
    return job.args.input_grad ? launch_noise<T, true>(config, how, job) : launch_noise<T, false>(config, how, job); \
  }

}  // namespace flatlora
