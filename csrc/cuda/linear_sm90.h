// y = a P^T + scaling u L^T + bias with P = W + eps (or its transpose), for sm_90a.
//
// A block owns a tile of y and keeps it in the registers of two consumer warpgroups. Groups of producers take turns on
// the steps of the contraction: they load W ahead, add the noise in registers, wait for a stage and write the tile as
// wgmma reads it, while the copy engine brings the tile of `a`. The blocks of a cluster are neighbours along
// the rows of `a`, so they need the same tile of W + eps: each draws its share of it and copies the share to the
// others.
#pragma once

#include "kernels.h"
#include "linear_job.h"
#include "noise.h"

namespace flatlora {

struct Sm90Tile {
  int m, n, cluster, stages;  // cluster: blocks, along the rows of `a`
  int producers, producer_registers, consumer_registers;  // warpgroups, and of a thread
  int cycles;  // of a step, docs/internals/performance.md

  static constexpr int k = 64;  // 128 bytes, the width of the swizzle
  static constexpr int kConsumers = 2;  // warpgroups
  constexpr int threads() const { return 128 * (kConsumers + producers); }
  // A thread begins with its part of the 64 Ki, in eights; the warpgroups then share what that takes.
  constexpr int registers() const { return (65536 / threads() & ~7) * threads(); }
  constexpr bool registers_fit() const {
    return 128 * (kConsumers * consumer_registers + producers * producer_registers) <= registers();
  }
  constexpr int a_bytes() const { return m * k * 2; }
  constexpr int w_bytes() const { return n * k * 2; }
  constexpr int stage_bytes() const { return a_bytes() + w_bytes(); }
  constexpr int shared_bytes() const { return stages * (stage_bytes() + 16); }
};

enum Sm90Config { kSm90Large, kSm90Middle, kSm90Small, kSm90Configs };

// A value drawn serves m * cluster rows.
constexpr Sm90Tile kSm90Tiles[kSm90Configs] = {
    {256, 128, 2, 4, 2, 88, 168, 2040},
    {256, 64, 1, 5, 3, 88, 104, 1650},
    {128, 64, 1, 8, 3, 104, 80, 1200},
};

struct Sm90Job {
  LinearJob linear;  // tiles_per_sample: a multiple of the cluster
  int64_t cluster_tiles;  // of all parts
};

template <class T, bool kInputGrad, Noise kNoise, int kConfig>
struct Sm90Linear {
  static constexpr Sm90Tile kTile = kSm90Tiles[kConfig];
  static constexpr int kStages = kTile.stages, kCluster = kTile.cluster;
  static constexpr int kABytes = kTile.a_bytes(), kStageBytes = kTile.stage_bytes();
  static constexpr int kBlocksM = kTile.m / 128;  // of 64 rows, for a consumer
  // A line of the tile of W is 64 columns of a row, 128 bytes.
  static constexpr int kShare = kTile.n / kCluster;  // lines that a block draws
  static constexpr int kShareBytes = kShare * 128;
  // A warpgroup of producers draws the share of a step, each thread a patch.
  using Own = Patch<kNoise>;
  static constexpr int kGroup = 128;
  static constexpr int kTurns = kTile.producers;
  static constexpr int kFirstRegisters = kTile.registers() / kTile.threads();
  static_assert(kTurns <= kStages);  // a parity tells a use of a stage from the next, not from the one after that
  static_assert(kShare * 64 == 32 * 128 && kTile.shared_bytes() + 1024 <= 227 << 10 && kTile.registers_fit());

  const LinearJob& job;
  gpu::Shared stages;
  int rank;  // in the cluster
  int64_t first_m, first_out, sample, part, begin;
  int lora_steps, steps;  // of the tile

  FLATLORA_DEVICE explicit Sm90Linear(const LinearJob& j)
      : job(j), stages(gpu::shared_base()), rank(gpu::cluster_rank() % kCluster) {}

  FLATLORA_DEVICE gpu::Shared a_stage(uint32_t slot) const { return stages + slot * kStageBytes; }
  FLATLORA_DEVICE gpu::Shared w_stage(uint32_t slot) const { return a_stage(slot) + kABytes; }
  FLATLORA_DEVICE gpu::Shared full(uint32_t slot) const { return a_stage(kStages) + 8 * slot; }
  FLATLORA_DEVICE gpu::Shared empty(uint32_t slot) const { return full(kStages + slot); }

  // A place in the ring of stages; the parity tells one use of a stage from the next.
  struct Ring {
    uint32_t slot = 0, parity = 0;
    template <int kCount = 1>
    FLATLORA_DEVICE void advance() {
      slot += uint32_t(kCount % kStages);
      parity ^= uint32_t(kCount / kStages) & 1;
      if (slot >= uint32_t(kStages)) slot -= uint32_t(kStages), parity ^= 1;
    }
  };

  // Of the cluster's `index`-th tile, what this block has. Neighbours share a tile of W, for the L2 cache.
  FLATLORA_DEVICE void set_tile(int64_t index) {
    constexpr int64_t kGroup = 4;
    const int64_t high = job.tiles_m / kCluster, width = job.tiles_n, tiles = high * width;
    part = index / tiles;
    index %= tiles;
    const int64_t first = index / (kGroup * width) * kGroup, within = index % (kGroup * width);
    const int64_t height = smaller(high - first, kGroup);
    const int64_t tile_m = (first + within % height) * kCluster + rank, tile_n = within / height;
    sample = tile_m / job.tiles_per_sample;
    first_m = sample * job.rows_per_sample + tile_m % job.tiles_per_sample * kTile.m;
    first_out = tile_n * kTile.n;
    begin = part * job.steps_per_part * kTile.k;
    lora_steps = part == 0 ? int((job.args.rank + kTile.k - 1) / kTile.k) : 0;
    const int64_t all = (job.length + kTile.k - 1) / kTile.k - part * job.steps_per_part;
    steps = lora_steps + int(smaller(all, job.steps_per_part));
  }

  FLATLORA_DEVICE void run(const gpu::TensorMap* a_map, const gpu::TensorMap* u_map, int64_t cluster_tiles) {
    if (gpu::thread() == 0) {
      for (int i = 0; i < kStages; ++i) {
        gpu::mbarrier_init(full(i), 2);
        gpu::mbarrier_init(empty(i), kCluster * kTile.kConsumers * 4);
      }
      gpu::fence_mbarrier_init();
    }
    gpu::cluster_sync();
    if (gpu::uniform(gpu::warp()) < 4 * kTile.producers) {
      set_registers<kTile.producer_registers>();
      produce(a_map, u_map, cluster_tiles);
    } else {
      set_registers<kTile.consumer_registers>();
      consume(cluster_tiles);
    }
    gpu::cluster_sync();  // no block ends while another one copies from it or arrives at its barriers
  }

  template <int kCount>
  FLATLORA_DEVICE static void set_registers() {
    if constexpr (kCount < kFirstRegisters) gpu::registers_decrease<kCount>();
    if constexpr (kCount > kFirstRegisters) gpu::registers_increase<kCount>();
  }

  // --- Producers ---

  FLATLORA_DEVICE static int this_turn() { return gpu::uniform(gpu::warp() / (kGroup / 32)); }
  FLATLORA_DEVICE static uint32_t member() { return uint32_t(gpu::thread()) % kGroup; }
  // Of the thread's first patch: the first line and chunk.
  FLATLORA_DEVICE static uint32_t chunk() { return member() % (8 / Own::kCols) * Own::kCols; }
  FLATLORA_DEVICE uint32_t first_line() const {
    const uint32_t index = member() / (8 / Own::kCols);
    return uint32_t(rank) * kShare + (Own::kUnit ? index / 8 * 16 + index % 8 : index * 4);
  }
  // Of the thread's first line: the row of W, and the first of its columns, at the beginning of the contraction.
  FLATLORA_DEVICE int64_t first_row() const { return kInputGrad ? first_line() % 64 : first_out + first_line(); }
  FLATLORA_DEVICE int64_t first_column() const {
    return (kInputGrad ? first_out + first_line() / 64 * 64 : 0) + chunk() * 8;
  }
  // Of chunk i, from the first one's.
  FLATLORA_DEVICE static constexpr int row(int i) { return Own::row(i); }
  FLATLORA_DEVICE static constexpr int column(int i) { return 8 * Own::col(i); }

  FLATLORA_DEVICE uint64_t row_bytes() const { return uint32_t(job.row_bytes); }
  FLATLORA_DEVICE int64_t row_offset(int i) const {
    if constexpr (Own::kUnit) return row(i) == 0 ? 0 : job.unit_bytes;
    return int64_t(row_bytes() * uint32_t(row(i)));
  }
  FLATLORA_DEVICE const char* weight_at(int64_t at) const {
    const int64_t n = first_row() + (kInputGrad ? at : 0), k = first_column() + (kInputGrad ? 0 : at);
    return static_cast<const char*>(job.args.weight.data) + n * int64_t(row_bytes()) + k * int64_t(sizeof(T));
  }
  // Whether W has the chunk. `left`: rows, or else columns, from where the thread's part of the step begins. `limit`:
  // the other of the two, which stays the same.
  FLATLORA_DEVICE static bool inside(int i, int left, int limit) {
    return kInputGrad ? row(i) < left && limit > column(i) : left > column(i) && row(i) < limit;
  }
  // The patch of a step, ahead of its turn; zeros where W ends.
  FLATLORA_DEVICE void load(Chunk<T> (&w)[4], const char* from, int left, int limit) const {
    FLATLORA_UNROLL
    for (int i = 0; i < 4; ++i)
      w[i] = inside(i, left, limit) ? gpu::load_global_once(from + row_offset(i) + column(i) * int(sizeof(T)))
                                    : Chunk<T>{};
  }
  // Where the thread's first chunk lies in a stage, and chunk i from there.
  FLATLORA_DEVICE uint32_t place() const {
    const uint32_t line = first_line();
    return line * 128 + ((chunk() ^ line % 8) << 4);
  }
  FLATLORA_DEVICE static void store(gpu::Shared at, int i, const Chunk<T>& w) {
    const uint32_t line = uint32_t(row(i));
    gpu::store_shared((at ^ (line % 8 ^ uint32_t(Own::col(i))) << 4) + line * 128, w);
  }

  // The adapter's factor: a line has 64 steps of the rank for one output, in both directions. Threads go down the
  // lines, so that all of them load what a low rank has, at once.
  FLATLORA_DEVICE void store_adapter(uint32_t slot, int64_t at) const {
    const LinearArgs& args = job.args;
    FLATLORA_NO_UNROLL
    for (int turn = 0; turn < kShare * 8 / kGroup; ++turn) {
      const uint32_t i = member() + uint32_t(turn * kGroup), line = uint32_t(rank) * kShare + i % kShare,
                     piece = i / kShare;
      const int64_t out = first_out + line;
      float x[8];
      floats_at(x, args.lora, args.lora_dtype, [&](int j) {
        const int64_t r = at + piece * 8 + j;
        return out < job.outputs && r < args.rank ? out * args.lora_out_stride + r * args.lora_rank_stride : -1;
      });
      Chunk<T> w;
      FLATLORA_UNROLL
      for (int j = 0; j < 4; ++j) w.v[j] = pack(T{}, x[2 * j], x[2 * j + 1]);
      gpu::store_shared(w_stage(slot) + line * 128 + ((piece ^ line % 8) << 4), w);
    }
  }

  // The thread that sends for tiles of `a` and u.
  FLATLORA_DEVICE static bool fetches() { return member() == 0; }
  // Sends for the tile of `a` or u, where the stage is free already; 1 where there is nothing left to send for.
  FLATLORA_DEVICE int open_early(const Ring& ring, const gpu::TensorMap* map, int at) const {
    if (!fetches()) return 1;
    if (!gpu::mbarrier_test(empty(ring.slot), ring.parity ^ 1)) return 0;
    fetch(ring, map, at);
    return 1;
  }
  // Waits until the stage is free, and sends for the tile of `a` or u.
  FLATLORA_DEVICE void open(const Ring& ring, const gpu::TensorMap* map, int at, int fetched = 0) const {
    gpu::mbarrier_wait(empty(ring.slot), ring.parity ^ 1);
    if (fetches() && !fetched) fetch(ring, map, at);
  }
  FLATLORA_DEVICE void fetch(const Ring& ring, const gpu::TensorMap* map, int at) const {
    gpu::mbarrier_arrive_expect(full(ring.slot), kABytes + (kCluster - 1) * kShareBytes);
    gpu::tma_load(a_stage(ring.slot), map, at, int(first_m), full(ring.slot));
  }
  // Of the producers whose turn it is.
  FLATLORA_DEVICE static void meet(int turn) { gpu::sync_named(1 + turn, kGroup); }
  // Gives the other blocks this one's share, and the stage to the consumers.
  FLATLORA_DEVICE void close(const Ring& ring, int turn) const {
    gpu::fence_proxy_async();
    meet(turn);
    if (fetches()) {
      const gpu::Shared share = w_stage(ring.slot) + uint32_t(rank) * kShareBytes;
      FLATLORA_UNROLL
      for (int i = 1; i < kCluster; ++i) gpu::copy_to_block((rank + i) % kCluster, share, kShareBytes, full(ring.slot));
      gpu::mbarrier_arrive(full(ring.slot));
    }
  }

  FLATLORA_DEVICE void produce(const gpu::TensorMap* a_map, const gpu::TensorMap* u_map, int64_t cluster_tiles) {
    const LinearArgs& args = job.args;
    Ring ring;
    // The same, which the compiler would else make anew in each step.
    const uint32_t mine = gpu::shuffle_xor(place(), 0);
    const int turn = this_turn();
    int first = turn;  // of this group's steps in the tile
    for (int i = 0; i < first; ++i) ring.advance();
    FLATLORA_NO_UNROLL
    for (int tile = int(gpu::block()) / kCluster; tile < int(cluster_tiles); tile += int(gpu::blocks()) / kCluster) {
      set_tile(tile);
      int step = first;
      FLATLORA_NO_UNROLL
      for (; step < lora_steps; step += kTurns, ring.template advance<kTurns>()) {
        open(ring, u_map, step * kTile.k);
        store_adapter(ring.slot, step * kTile.k);
        close(ring, turn);
      }

      const Draw draw = draw_of(args.noise, sample);
      int at = int(begin) + (step - lora_steps) * kTile.k;
      const char* from = weight_at(at);
      constexpr uint32_t kColumns = kTurns * kTile.k;
      const int64_t from_step = kInputGrad ? job.turn_bytes : int64_t(kColumns * sizeof(T));
      const float* scale = args.noise.scale + first_row() + (kInputGrad ? at : 0);
      const int limit = int(smaller(kInputGrad ? args.K - first_column() : args.N - first_row(), 16));
      // Nothing is loaded beyond the part.
      const int64_t last = smaller(job.length, begin + job.steps_per_part * kTile.k);
      int left = int(last - (kInputGrad ? first_row() : first_column()) - at);
      PatchRows<kNoise, T> rows;
      PatchBlocks<kNoise> blocks;
      const auto load_factors = [&](int count) {
        FLATLORA_UNROLL
        for (int i = 0; i < 4; i += Own::kCols) {
          const auto factor = row(i) < count ? factor_of<kNoise, T>(draw, gpu::load_global<float>(scale + row(i)))
                                             : Factor<kNoise, T>(0);
          FLATLORA_UNROLL
          for (int c = 0; c < Own::kCols; ++c) rows.factor[i + c] = factor;
        }
      };
      if constexpr (kInputGrad) {
        blocks = set_blocks<kNoise>(draw, uint32_t(first_column() >> 3));
      } else {
        set_rows(rows, draw, uint32_t(first_row()));
        load_factors(limit);
      }
      Chunk<T> next[4];
      load(next, from, left, limit);
      FLATLORA_NO_UNROLL
      for (; step < steps; step += kTurns, at += int(kColumns), ring.template advance<kTurns>()) {
        const int fetched = open_early(ring, a_map, at);
        const int here = left;
        Chunk<T> w[4];
        FLATLORA_UNROLL
        for (int i = 0; i < 4; ++i) w[i] = next[i];
        from += from_step;
        left -= int(kColumns);
        load(next, from, left, limit);
        if constexpr (kInputGrad) {
          set_rows(rows, draw, uint32_t(first_row() + at));
          load_factors(here);
        } else {
          blocks = set_blocks<kNoise>(draw, uint32_t(at + int(chunk()) * 8) >> 3);
        }
        // Zeros beyond the contraction, because noise may overflow float16, and infinity times zero is NaN.
        FLATLORA_UNROLL
        for (int i = 0; i < 4; ++i)
          if (!kInputGrad && here <= column(i)) rows.factor[i] = Factor<kNoise, T>(0);
        perturb_patch<kNoise, T>(w, draw, rows, blocks);
        open(ring, a_map, at, fetched);
        FLATLORA_UNROLL
        for (int i = 0; i < 4; ++i) store(w_stage(ring.slot) + mine, i, w[i]);
        if constexpr (kInputGrad) scale += kColumns;
        close(ring, turn);
      }
      first = step - steps;  // of the next tile
    }
  }

  // --- Consumers ---

  FLATLORA_DEVICE static int consumer() { return gpu::uniform(gpu::warp() / 4) - kTile.producers; }

  using Accumulators = float[kBlocksM][kTile.n / 2];

  // PTX's matrix descriptor with the 128-byte swizzle. `box`: bytes from 64 columns to the next 64, where the
  // contraction lies across lines.
  FLATLORA_DEVICE static uint64_t describe(gpu::Shared p, uint32_t box) {
    const uint64_t eight_lines = 1024 >> 4;
    return uint64_t(1) << 62 | eight_lines << 32 | uint64_t(box >> 4) << 16 | (p & 0x3ffff) >> 4;
  }

  // kTransposed: a line of W is a step of the contraction, else an output.
  template <bool kTransposed>
  FLATLORA_DEVICE void multiply(Accumulators& acc, uint32_t slot) const {
    const uint32_t row = uint32_t(consumer()) * (kTile.m / 2);
    const uint64_t a = describe(a_stage(slot) + row * 128, 16);
    const uint64_t w = describe(w_stage(slot), kTransposed ? 64 * 128 : 16);
    FLATLORA_UNROLL
    for (int i = 0; i < kBlocksM; ++i) gpu::wgmma_hold(acc[i]);
    gpu::wgmma_fence();
    FLATLORA_UNROLL
    for (int piece = 0; piece < 4; ++piece) {
      FLATLORA_UNROLL
      for (int i = 0; i < kBlocksM; ++i)
        gpu::wgmma<kTransposed>(acc[i], a + ((i * 64 * 128 + piece * 32) >> 4),
                                w + ((kTransposed ? piece * 16 * 128 : piece * 32) >> 4), 1, T{});
    }
    gpu::wgmma_commit();
  }

  FLATLORA_DEVICE void hold(Accumulators& acc) const {
    FLATLORA_UNROLL
    for (int i = 0; i < kBlocksM; ++i) gpu::wgmma_hold(acc[i]);
  }

  // Every warp tells the blocks that write into this one.
  FLATLORA_DEVICE void release(uint32_t slot) const {
    if constexpr (kCluster == 1) {
      if (gpu::lane() == 0) gpu::mbarrier_arrive(empty(slot));
    } else {
      if (gpu::lane() < kCluster) gpu::mbarrier_arrive_cluster(empty(slot), gpu::lane());
    }
  }

  FLATLORA_DEVICE void consume(int64_t cluster_tiles) {
    Ring ring;
    FLATLORA_NO_UNROLL
    for (int tile = int(gpu::block()) / kCluster; tile < int(cluster_tiles); tile += int(gpu::blocks()) / kCluster) {
      set_tile(tile);
      Accumulators acc;
      FLATLORA_UNROLL
      for (int i = 0; i < kBlocksM; ++i) {
        FLATLORA_UNROLL
        for (int j = 0; j < kTile.n / 2; ++j) acc[i][j] = 0.0f;
      }
      FLATLORA_NO_UNROLL
      for (int step = 0; step < lora_steps; ++step, ring.advance()) {
        gpu::mbarrier_wait(full(ring.slot), ring.parity);
        multiply<false>(acc, ring.slot);
        gpu::wgmma_wait<0>();
        hold(acc);
        release(ring.slot);
      }
      // Always, because after a branch here the compiler would wait for each wgmma of the loop.
      const float scaling = lora_steps > 0 ? float(job.args.scaling) : 1.0f;
      FLATLORA_UNROLL
      for (int i = 0; i < kBlocksM; ++i) {
        FLATLORA_UNROLL
        for (int j = 0; j < kTile.n / 2; ++j) acc[i][j] *= scaling;
      }
      uint32_t before = ring.slot;
      FLATLORA_NO_UNROLL
      for (int step = lora_steps; step < steps; ++step, ring.advance()) {
        gpu::mbarrier_wait(full(ring.slot), ring.parity);
        multiply<kInputGrad>(acc, ring.slot);
        gpu::wgmma_wait<1>();
        hold(acc);
        if (step > lora_steps) release(before);
        before = ring.slot;
      }
      gpu::wgmma_wait<0>();
      hold(acc);
      release(before);
      store(acc);
    }
  }

  FLATLORA_DEVICE float bias_at(int64_t out) const {
    const LinearArgs& args = job.args;
    if (args.bias == nullptr || job.parts > 1 || out >= job.outputs) return 0.0f;
    return float_at(args.bias, args.bias_dtype, out * args.bias_stride);
  }

  FLATLORA_DEVICE void store(const Accumulators& acc) const {
    const int64_t last_m = (sample + 1) * job.rows_per_sample;
    const int warp = gpu::warp() - 4 * kTile.producers, quarter = gpu::lane() % 4;
    const int64_t first_row = first_m + warp / 4 * (kTile.m / 2) + warp % 4 * 16 + gpu::lane() / 4;
    FLATLORA_UNROLL
    for (int j = 0; j < kTile.n / 8; j += 4) {
      float bias[4][2];
      FLATLORA_UNROLL
      for (int b = 0; b < 4; ++b) {
        const int64_t out = first_out + (j + b) * 8 + quarter * 2;
        bias[b][0] = bias_at(out);
        bias[b][1] = bias_at(out + 1);
      }
      FLATLORA_UNROLL
      for (int i = 0; i < kBlocksM; ++i) {
        FLATLORA_UNROLL
        for (int h = 0; h < 2; ++h) {
          const int64_t row = first_row + i * 64 + h * 8;
          if (job.parts > 1) {
            FLATLORA_UNROLL
            for (int b = 0; b < 4; ++b)
              store_part(row, last_m, j + b, acc[i][4 * (j + b) + 2 * h], acc[i][4 * (j + b) + 2 * h + 1]);
          } else {
            gpu::Words<4> w;
            FLATLORA_UNROLL
            for (int b = 0; b < 4; ++b)
              w.v[b] =
                  pack(T{}, acc[i][4 * (j + b) + 2 * h] + bias[b][0], acc[i][4 * (j + b) + 2 * h + 1] + bias[b][1]);
            transpose(w, quarter);
            store_eight(row, last_m, first_out + (j + quarter) * 8, w);
          }
        }
      }
    }
  }

  // Word b of lane q of four goes to word q of lane b.
  FLATLORA_DEVICE static void transpose(gpu::Words<4>& w, int quarter) {
    FLATLORA_UNROLL
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool upper = quarter & bit;
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (i & bit) continue;
        const uint32_t got = gpu::shuffle_xor(upper ? w.v[i] : w.v[i + bit], bit);
        w.v[i] = upper ? got : w.v[i];
        w.v[i + bit] = upper ? w.v[i + bit] : got;
      }
    }
  }

  FLATLORA_DEVICE void store_eight(int64_t row, int64_t last_m, int64_t out, const gpu::Words<4>& w) const {
    if (row >= last_m || out >= job.outputs) return;
    uint16_t* const p = static_cast<uint16_t*>(job.args.y) + row * job.outputs + out;
    if (job.outputs % 8 == 0) {
      gpu::store_global(p, w);
      return;
    }
    FLATLORA_UNROLL
    for (int i = 0; i < 8; ++i)
      if (out + i < job.outputs) gpu::store_global(p + i, uint16_t(w.v[i / 2] >> 16 * (i % 2)));
  }

  FLATLORA_DEVICE void store_part(int64_t row, int64_t last_m, int block, float even, float odd) const {
    const int64_t out = first_out + block * 8 + gpu::lane() % 4 * 2;
    if (row >= last_m || out >= job.outputs) return;
    float* const p = job.partial + (part * job.args.M + row) * job.outputs + out;
    if (job.outputs % 2 == 0) {
      gpu::store_global(p, gpu::Words<2>{{as_int(even), as_int(odd)}});
    } else {
      gpu::store_global(p, even);
      if (out + 1 < job.outputs) gpu::store_global(p + 1, odd);
    }
  }
};

template <class T, bool kInputGrad, Noise kNoise, int kConfig>
FLATLORA_KERNEL(kSm90Tiles[kConfig].threads(), 1)
linear_sm90_kernel(const FLATLORA_GRID_CONSTANT gpu::TensorMap a_map, const FLATLORA_GRID_CONSTANT gpu::TensorMap u_map,
                   const FLATLORA_GRID_CONSTANT Sm90Job job) {
  Sm90Linear<T, kInputGrad, kNoise, kConfig>(job.linear).run(&a_map, &u_map, job.cluster_tiles);
}

// Of one type, in the file named after it.
template <class T, bool kInputGrad, Noise kNoise>
gpu::Error launch_sm90_config(int config, const gpu::Launch& how, const gpu::TensorMap& a_map,
                              const gpu::TensorMap& u_map, const Sm90Job& job) {
  if (config == kSm90Large)
    return gpu::launch(linear_sm90_kernel<T, kInputGrad, kNoise, kSm90Large>, how, a_map, u_map, job);
  if (config == kSm90Middle)
    return gpu::launch(linear_sm90_kernel<T, kInputGrad, kNoise, kSm90Middle>, how, a_map, u_map, job);
  return gpu::launch(linear_sm90_kernel<T, kInputGrad, kNoise, kSm90Small>, how, a_map, u_map, job);
}

// Clusters of this configuration that run at once: the same number for all its kernels, which take whole processors.
template <class T>
gpu::Error clusters_sm90_config(int config, const gpu::Launch& how, int64_t processors, int64_t* count) {
  constexpr Noise kNoise = Noise::kGaussian;
  if (config == kSm90Large)
    return gpu::clusters_at_once(linear_sm90_kernel<T, false, kNoise, kSm90Large>, how, processors, count);
  if (config == kSm90Middle)
    return gpu::clusters_at_once(linear_sm90_kernel<T, false, kNoise, kSm90Middle>, how, processors, count);
  return gpu::clusters_at_once(linear_sm90_kernel<T, false, kNoise, kSm90Small>, how, processors, count);
}

template <class T, bool kInputGrad>
gpu::Error launch_sm90_noise(int config, const gpu::Launch& how, const gpu::TensorMap& a_map,
                             const gpu::TensorMap& u_map, const Sm90Job& job) {
  switch (static_cast<Noise>(job.linear.args.noise.kind)) {
    case Noise::kGaussian: return launch_sm90_config<T, kInputGrad, Noise::kGaussian>(config, how, a_map, u_map, job);
    case Noise::kNearGaussian:
      return launch_sm90_config<T, kInputGrad, Noise::kNearGaussian>(config, how, a_map, u_map, job);
    default: return launch_sm90_config<T, kInputGrad, Noise::kRademacher>(config, how, a_map, u_map, job);
  }
}

gpu::Error clusters_sm90(int config, const gpu::Launch& how, int64_t processors, int64_t* count);

template <class T>
gpu::Error launch_linear_sm90(int config, const gpu::Launch& how, const gpu::TensorMap& a_map,
                              const gpu::TensorMap& u_map, const Sm90Job& job);

#define FLATLORA_LINEAR_SM90(T)                                                                      \
  template <>                                                                                        \
  gpu::Error launch_linear_sm90<T>(int config, const gpu::Launch& how, const gpu::TensorMap& a_map,  \
                                   const gpu::TensorMap& u_map, const Sm90Job& job) {                \
    return job.linear.args.input_grad ? launch_sm90_noise<T, true>(config, how, a_map, u_map, job)   \
                                      : launch_sm90_noise<T, false>(config, how, a_map, u_map, job); \
  }

}  // namespace flatlora
