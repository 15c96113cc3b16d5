// y = a P^T + scaling u L^T + bias with P = W + eps (or its transpose), for sm_90a and many rows of `a`: each value is
// drawn once, whatever their number.
//
// All blocks are there at once. The tiles of y that they have at a time are a wave. It needs the tiles of W + eps of a
// few columns of tiles, for one step of the contraction after the other: warps of all blocks draw these in that order
// into a ring in global memory, which the L2 cache holds, and a wave's blocks read each of them. Counters tell what is
// drawn, and what all have read, so that its place is free. In each block seven warps draw, one sends for tiles of `a`
// and of the ring, and two warpgroups multiply. Tiles of the adapter's factor come through the ring like those of W +
// eps. Where the call brings A and not u = a A^T, the warps that multiply make u first, each block some rows, while the
// first tiles are drawn.
#pragma once

#include "linear_job.h"
#include "noise.h"

namespace flatlora {

struct AheadTile {
  int n, stages;

  static constexpr int m = 128, k = 64;  // k: 128 bytes, the width of the swizzle
  static constexpr int kConsumers = 2, kDrawers = 7;  // warpgroups, and warps; one more warp sends
  static constexpr int kThreads = 128 * (kConsumers + 2);
  static constexpr int kConsumerRegisters = 160, kRegisters = 96;
  static constexpr int kABytes = m * k * 2;
  static constexpr int kOutLines = 16, kOutBytes = kOutLines * 128;  // that a warp stores at a time

  static constexpr int kURows = 16, kURanks = 32;  // of u that a block makes at a time
  static constexpr int kUColumns = 32;  // of `a`, that a warp takes at a time

  constexpr int w_bytes() const { return n * k * 2; }
  constexpr int stage_bytes() const { return kABytes + w_bytes(); }
  constexpr int out_bytes() const { return kConsumers * 4 * 2 * kOutBytes; }
  constexpr int shared_bytes() const { return stages * (stage_bytes() + 16) + out_bytes(); }
};

// Lines that a warp draws between two looks at the counters: as much work of either kind. A thread has patches; of
// rademacher 16 lines, which one call of the generator serves.
constexpr int unit_lines(Noise kind) { return kind == Noise::kGaussian ? 32 : 64; }

enum AheadConfig { kAheadLarge, kAheadSmall, kAheadConfigs };
constexpr AheadTile kAheadTiles[kAheadConfigs] = {{256, 4}, {128, 6}};

struct AheadJob {
  LinearArgs args;
  int64_t outputs, length, row_bytes, rows_per_sample;
  int tiles_m, tiles_n, columns, tiles;  // of a sample; then of all
  uint32_t per_tiles_n;  // 2^32 over it, rounded up
  int lora_steps, steps;  // of a tile; `steps` has both kinds
  int workers, waves;  // blocks that have tiles; the others draw
  int idle;  // that have none in the last wave
  int wide, depth;  // of the ring: tiles of a step, at most, and steps
  int stride_steps, stride_units;  // from a drawing warp's unit to its next
  char* ring;
  uint32_t* drawn;  // (depth, wide): units
  uint32_t* read;  // (depth,): blocks
  uint32_t* made;  // blocks that have made their rows of u
};

// A step of a wave, and its place in the ring. `use`: how often the place was used before.
struct AheadStep {
  int wave = 0, step = 0, slot = 0, use = 0;

  FLATLORA_DEVICE void advance(const AheadJob& job, int steps) {
    for (step += steps; step >= job.steps; step -= job.steps) ++wave;
    for (slot += steps; slot >= job.depth; slot -= job.depth) ++use;
  }
};

template <class T, bool kInputGrad, Noise kNoise, int kConfig>
struct Ahead {
  static constexpr AheadTile kTile = kAheadTiles[kConfig];
  static constexpr int kStages = kTile.stages, kHalves = kTile.n / 128;
  static constexpr int kUnit = unit_lines(kNoise), kUnits = kTile.n / kUnit;
  static constexpr int kLineBytes = 128;  // 64 columns of a row of W + eps
  static constexpr int kWBytes = kTile.w_bytes(), kStageBytes = kTile.stage_bytes(), kOutBytes = kTile.out_bytes();
  using Own = Patch<kNoise>;
  static_assert(kTile.shared_bytes() + 1024 <= 227 << 10);
  static_assert(AheadTile::kConsumerRegisters * 128 * AheadTile::kConsumers + AheadTile::kRegisters * 256 <= 65536);

  const AheadJob& job;
  gpu::Shared stages;

  FLATLORA_DEVICE explicit Ahead(const AheadJob& j) : job(j), stages(gpu::shared_base()) {}

  FLATLORA_DEVICE gpu::Shared a_stage(uint32_t slot) const { return stages + slot * kStageBytes; }
  FLATLORA_DEVICE gpu::Shared w_stage(uint32_t slot) const { return a_stage(slot) + AheadTile::kABytes; }
  FLATLORA_DEVICE gpu::Shared out() const { return a_stage(kStages); }
  FLATLORA_DEVICE gpu::Shared full(uint32_t slot) const { return out() + kOutBytes + 8 * slot; }
  FLATLORA_DEVICE gpu::Shared empty(uint32_t slot) const { return full(kStages + slot); }

  // A place in the block's own ring of stages; the parity tells one use of a stage from the next.
  struct Stage {
    uint32_t slot = 0, parity = 0;
    FLATLORA_DEVICE void advance() {
      if (++slot == uint32_t(kStages)) slot = 0, parity ^= 1;
    }
  };

  // --- Tiles ---

  // Down a column of tiles first: those of a wave share columns.
  FLATLORA_DEVICE int tile_of(int wave) const { return wave * job.workers + int(gpu::block()); }
  FLATLORA_DEVICE bool has_tile(int wave) const { return int(gpu::block()) < job.workers && tile_of(wave) < job.tiles; }
  FLATLORA_DEVICE int first_column(int wave) const { return wave * job.workers / job.tiles_m; }
  // Columns of tiles are those of one sample after the other.
  FLATLORA_DEVICE int sample_of(int column) const {
    uint32_t high, low;
    mulhilo(job.per_tiles_n, uint32_t(column), high, low);
    return job.tiles_n == 1 ? column : int(high);
  }
  FLATLORA_DEVICE int first_out(int column) const { return (column - sample_of(column) * job.tiles_n) * kTile.n; }

  FLATLORA_DEVICE void run(const gpu::TensorMap* a_map, const gpu::TensorMap* u_map, const gpu::TensorMap* w_map,
                           const gpu::TensorMap* y_map) {
    if (gpu::thread() == 0) {
      for (int i = 0; i < kStages; ++i) {
        gpu::mbarrier_init(full(i), 1);
        gpu::mbarrier_init(empty(i), AheadTile::kConsumers * 4);
      }
      gpu::fence_mbarrier_init();
    }
    gpu::sync_threads();
    const int warp = gpu::uniform(gpu::warp());
    if (warp < 4 * AheadTile::kConsumers) {
      gpu::registers_increase<AheadTile::kConsumerRegisters>();
      consume(y_map);
    } else {
      gpu::registers_decrease<AheadTile::kRegisters>();
      if (warp == 4 * AheadTile::kConsumers)
        send(a_map, u_map, w_map);
      else
        draw(warp - 4 * AheadTile::kConsumers - 1);
    }
  }

  // --- Counters ---

  // Waits until a step has what it needs, and tells how many from there on have. reached(i, wait): whether the i-th
  // has.
  template <class Reached>
  FLATLORA_DEVICE static int await(Reached reached) {
    reached(0, true);
    const uint32_t there = gpu::vote(reached(gpu::lane(), false));
    gpu::fence_gpu();
    gpu::fence_proxy_async_global();
    gpu::sync_warp();
    return gpu::count_bits(there & ~(there + 1));
  }
  FLATLORA_DEVICE static bool counted(const uint32_t* counter, uint32_t least, bool wait) {
    if (!wait) return gpu::at_least(counter, least);
    gpu::wait_at_least(counter, least);
    return true;
  }

  // How many blocks have read all earlier steps that had this place.
  FLATLORA_DEVICE uint32_t readers(int slot, int use) const {
    const int of_last_wave = use * job.depth + slot - (job.waves - 1) * job.steps;
    const int short_uses = of_last_wave >= job.depth ? of_last_wave / job.depth : 0;
    return uint32_t(job.workers * use - job.idle * short_uses);
  }

  // --- u ---

  static constexpr int kUTiles = AheadTile::kURanks / 8, kUWarps = 4 * AheadTile::kConsumers, kUUnroll = 4;

  // Adds the products of a warp's columns. A lane has eight side by side of each row, in one order for both factors.
  FLATLORA_DEVICE void add_u(float (&sum)[kUTiles][4], int64_t first_row, int first_rank) const {
    const LinearArgs& args = job.args;
    const int group = gpu::lane() / 4, length = int(job.length);
    const auto line = [](const void* data, int64_t row, int64_t stride) {
      return static_cast<const char*>(data) + row * stride * 2;
    };
    const char* const x = line(args.a, first_row + group, args.a_row_stride);
    const char* const A = line(args.lora_A, first_rank + group, args.lora_A_stride);
    const int ranks = int(args.rank) - first_rank;
    const bool upper = first_row + group < args.M, lower = first_row + group + 8 < args.M;
    FLATLORA_NO_UNROLL
    for (int first = gpu::warp() * AheadTile::kUColumns; first < length;
         first += kUUnroll * kUWarps * AheadTile::kUColumns) {
      const int k = first + gpu::lane() % 4 * 8;
      gpu::Words<4> rows[kUUnroll][2], factor[kUUnroll][kUTiles];
      FLATLORA_UNROLL
      for (int i = 0; i < kUUnroll; ++i) {
        const int at = k + i * kUWarps * AheadTile::kUColumns;
        const bool inside = at < length;
        rows[i][0] = inside && upper ? gpu::load_global_once(x + int64_t(at) * 2) : gpu::Words<4>{};
        rows[i][1] = inside && lower ? gpu::load_global_once(x + (8 * args.a_row_stride + at) * 2) : gpu::Words<4>{};
        FLATLORA_UNROLL
        for (int j = 0; j < kUTiles; ++j)
          factor[i][j] = inside && 8 * j < ranks
                             ? gpu::load_global<gpu::Words<4>>(A + (8 * j * args.lora_A_stride + at) * 2)
                             : gpu::Words<4>{};
      }
      FLATLORA_UNROLL
      for (int i = 0; i < kUUnroll; ++i) {
        FLATLORA_UNROLL
        for (int j = 0; j < kUTiles; ++j) {
          FLATLORA_UNROLL
          for (int half = 0; half < 4; half += 2) {
            const uint32_t a[4] = {rows[i][0].v[half], rows[i][1].v[half], rows[i][0].v[half + 1],
                                   rows[i][1].v[half + 1]};
            const uint32_t b[2] = {factor[i][j].v[half], factor[i][j].v[half + 1]};
            gpu::mma(sum[j], a, b, T{});
          }
        }
      }
    }
  }

  // A thread adds the warps' sums of two neighbours of u, as a lane of `mma` has them.
  FLATLORA_DEVICE void store_u(const float (&sum)[kUTiles][4], int64_t first_row, int first_rank) const {
    const auto place = [this](int warp, int tile, int lane) {
      return out() + uint32_t((warp * kUTiles + tile) * 32 + lane) * 16;
    };
    FLATLORA_UNROLL
    for (int j = 0; j < kUTiles; ++j) {
      gpu::Words<4> words;
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) words.v[i] = as_int(sum[j][i]);
      gpu::store_shared(place(gpu::warp(), j, gpu::lane()), words);
    }
    gpu::sync_named(1, kUWarps * 32);
    const int tile = gpu::thread() / 64, lane = gpu::thread() / 2 % 32, half = gpu::thread() % 2;
    float low = 0.0f, high = 0.0f;
    FLATLORA_UNROLL
    for (int warp = 0; warp < kUWarps; ++warp) {
      const gpu::Words<2> words = gpu::load_shared<gpu::Words<2>>(place(warp, tile, lane) + uint32_t(half) * 8);
      low += as_float(words.v[0]);
      high += as_float(words.v[1]);
    }
    const int64_t row = first_row + lane / 4 + 8 * half, rank = first_rank + 8 * tile + lane % 4 * 2;
    if (row < job.args.M && rank < job.args.rank)
      gpu::store_global(static_cast<uint16_t*>(job.args.u) + row * job.args.rank + rank, pack(T{}, low, high));
    gpu::fence_proxy_async_global();
    gpu::sync_named(1, kUWarps * 32);
  }

  FLATLORA_DEVICE void make_u() const {
    FLATLORA_NO_UNROLL
    for (int64_t row = gpu::block() * AheadTile::kURows; row < job.args.M; row += gpu::blocks() * AheadTile::kURows) {
      FLATLORA_NO_UNROLL
      for (int rank = 0; rank < job.args.rank; rank += AheadTile::kURanks) {
        float sum[kUTiles][4] = {};
        add_u(sum, row, rank);
        store_u(sum, row, rank);
      }
    }
    if (gpu::thread() == 0) gpu::add_release(job.made, 1);
  }

  // --- Warps that draw ---

  // kUnit lines of a step's tile: of outputs, or along the contraction.
  struct Unit {
    AheadStep at;
    int index;  // of those that a step has
    int column, columns;  // of the wave: the first, and how many
  };
  FLATLORA_DEVICE void advance(Unit& unit, int steps, int units) const {
    unit.index += units;
    if (unit.index >= job.wide * kUnits) unit.index -= job.wide * kUnits, ++steps;
    const int before = unit.at.wave;
    unit.at.advance(job, steps);
    if (unit.at.wave != before) set_wave(unit);
  }
  FLATLORA_DEVICE void set_wave(Unit& unit) const {
    const int64_t end = smaller(int64_t(unit.at.wave + 1) * job.workers, job.tiles);
    unit.column = first_column(unit.at.wave);
    unit.columns = int(end - 1) / job.tiles_m + 1 - unit.column;
  }
  // What of a unit is the thread's: the first chunk of its patches.
  struct Place {
    int row, col;  // of W; of an adapter's tile the output, and the rank
    int sample;
    bool adapter, inside;  // inside: the wave has this column of tiles
  };

  FLATLORA_DEVICE static int chunk() { return gpu::lane() % (8 / Own::kCols) * Own::kCols; }
  FLATLORA_DEVICE static int line() {
    return Own::kUnit ? gpu::lane() / 4 : gpu::lane() / 8 * (kNoise == Noise::kRademacher ? 16 : 4);
  }
  static constexpr int kPatches = kUnit / 16, kNextPatch = kNoise == Noise::kRademacher ? 4 : 16;  // lines
  // Of chunk i, from the first one's.
  FLATLORA_DEVICE static constexpr int row(int i) { return Own::row(i); }
  FLATLORA_DEVICE static constexpr int column(int i) { return 8 * Own::col(i); }

  FLATLORA_DEVICE Place place_of(const Unit& unit) const {
    const int tile = unit.index / kUnits, of_tile = unit.index % kUnits * kUnit + line();
    Place p;
    const int column = unit.column + tile, out = first_out(column);
    p.inside = tile < unit.columns;
    p.sample = sample_of(column);
    p.adapter = unit.at.step < job.lora_steps;
    const int at = (unit.at.step - (p.adapter ? 0 : job.lora_steps)) * AheadTile::k;
    if (p.adapter || !kInputGrad) {
      p.row = out + of_tile;
      p.col = at + chunk() * 8;
    } else {
      p.row = at + of_tile % 64;
      p.col = out + of_tile / 64 * 64 + chunk() * 8;
    }
    return p;
  }

  // The tile's place in the ring, and the first chunk there.
  FLATLORA_DEVICE int tile_in_ring(const Unit& unit) const { return unit.at.slot * job.wide + unit.index / kUnits; }
  FLATLORA_DEVICE char* in_ring(const Unit& unit) const {
    const int of_tile = unit.index % kUnits * kUnit + line();
    return job.ring + int64_t(tile_in_ring(unit)) * kWBytes + of_tile * kLineBytes + chunk() * 16;
  }

  FLATLORA_DEVICE bool is_whole(const Unit& unit) const {
    const int out = first_out(unit.column + unit.index / kUnits), of_tile = unit.index % kUnits * kUnit;
    const int at = (unit.at.step - job.lora_steps) * AheadTile::k;
    const int outs = kInputGrad ? of_tile / 64 * 64 + 64 : of_tile + kUnit,
              steps = kInputGrad ? of_tile % 64 + kUnit : 64;
    return out + outs <= int(job.outputs) && at + steps <= int(job.length);
  }
  // Whether W has chunk i of the patch that begins at p. kWhole: it has all of the unit.
  template <bool kWhole>
  FLATLORA_DEVICE bool has(const Place& p, int i) const {
    return kWhole || (p.row + row(i) < int(job.args.N) && p.col + column(i) < int(job.args.K));
  }
  // Zeros where W ends.
  template <bool kWhole>
  FLATLORA_DEVICE void load(const Place& p, Chunk<T> (&w)[4]) const {
    const char* from = static_cast<const char*>(job.args.weight.data) + p.row * job.row_bytes + int64_t(p.col) * 2;
    FLATLORA_UNROLL
    for (int i = 0; i < 4; ++i)
      w[i] = has<kWhole>(p, i) ? gpu::load_global_once(from + row(i) * job.row_bytes + column(i) * 2) : Chunk<T>{};
  }
  // Zeros there, too, because noise may overflow float16, and infinity times zero is NaN.
  template <bool kWhole>
  FLATLORA_DEVICE void load_factors(const Place& p, const Draw& draw, Factor<kNoise, T> (&factor)[4]) const {
    const float* scale = job.args.noise.scale + p.row;
    FLATLORA_UNROLL
    for (int i = 0; i < 4; ++i)
      factor[i] = factor_of<kNoise, T>(draw, has<kWhole>(p, i) ? gpu::load_global<float>(scale + row(i)) : 0.0f);
  }
  // What all patches of a unit share.
  struct Keys {
    uint32_t words[1][4];  // of rademacher: a word to a patch
    PatchBlocks<kNoise> blocks;
  };
  FLATLORA_DEVICE static Keys keys_of(const Place& p, const Draw& draw) {
    Keys keys;
    keys.blocks = set_blocks<kNoise>(draw, uint32_t(p.col) >> 3);
    if constexpr (kNoise == Noise::kRademacher) {
      const RowKey rows[1] = {row_key(draw, (draw.first_row + uint32_t(p.row)) >> 4)};
      philox(draw, rows, keys.blocks.key[0], keys.words);
    }
    return keys;
  }
  template <bool kWhole>
  FLATLORA_DEVICE void draw_patch(int patch, const Place& p, const Draw& draw, const Keys& keys,
                                  Chunk<T> (&w)[4]) const {
    PatchRows<kNoise, T> rows;
    load<kWhole>(p, w);
    load_factors<kWhole>(p, draw, rows.factor);
    if constexpr (kNoise == Noise::kRademacher) {
      add_signs<kNoise, T>(w, keys.words[0][patch], rows.factor);
    } else {
      set_rows(rows, draw, uint32_t(p.row));
      perturb_patch<kNoise, T>(w, draw, rows, keys.blocks);
    }
  }
  // The adapter's factor.
  FLATLORA_DEVICE void store_adapter(const Place& p, char* to) const {
    const LinearArgs& args = job.args;
    FLATLORA_NO_UNROLL
    for (int i = 0; i < 4 * kPatches; ++i) {
      const int line = i / 4 * kNextPatch + row(i % 4);
      const int64_t out = p.row + line, first = p.col + column(i % 4);
      float x[8];
      floats_at(x, args.lora, args.lora_dtype, [&](int j) {
        const int64_t r = first + j;
        return out < job.outputs && r < args.rank ? out * args.lora_out_stride + r * args.lora_rank_stride : -1;
      });
      Chunk<T> w;
      FLATLORA_UNROLL
      for (int j = 0; j < 4; ++j) w.v[j] = pack(T{}, x[2 * j], x[2 * j + 1]);
      gpu::store_global(to + line * kLineBytes + Own::col(i % 4) * 16, w);
    }
  }

  // Says that the warp's last unit is drawn.
  FLATLORA_DEVICE static void tell(uint32_t* counter) {
    gpu::fence_proxy_async_global();
    gpu::sync_warp();
    if (gpu::lane() == 0) gpu::add_release(counter, 1);
  }

  // What a drawing warp keeps from unit to unit.
  struct Progress {
    int last;  // the tile in the ring that has its last unit; negative at first
    int free;  // all steps before this one have a free place in the ring
  };
  // Tells of the last unit, by when its stores are over and before the warp waits for others; then waits for room.
  FLATLORA_DEVICE void make_room(const Unit& unit, Progress& progress) const {
    if (progress.last >= 0) tell(job.drawn + progress.last);
    progress.last = tile_in_ring(unit);
    const AheadStep& at = unit.at;
    const int serial = at.use * job.depth + at.slot;
    if (serial < progress.free) return;
    progress.free = serial + await([&](int i, bool wait) {
                      const bool wraps = at.slot + i >= job.depth;
                      const int slot = at.slot + i - (wraps ? job.depth : 0);
                      return i < job.depth && counted(job.read + slot, readers(slot, at.use + wraps), wait);
                    });
  }
  template <bool kWhole>
  FLATLORA_DEVICE void draw_unit(const Unit& unit, Place p, const Draw& draw, Progress& progress) const {
    const Keys keys = keys_of(p, draw);
    FLATLORA_UNROLL
    for (int patch = 0; patch < kPatches; ++patch, p.row += kNextPatch) {
      Chunk<T> w[4];
      draw_patch<kWhole>(patch, p, draw, keys, w);
      if (patch == 0) make_room(unit, progress);
      char* const to = in_ring(unit) + patch * kNextPatch * kLineBytes;
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) gpu::store_global(to + row(i) * kLineBytes + Own::col(i) * 16, w[i]);
    }
  }

  FLATLORA_DEVICE void draw(int warp) const {
    const int all = job.wide * kUnits, first = warp * int(gpu::blocks()) + int(gpu::block());
    Unit unit{{}, first % all, 0, 0};
    unit.at.advance(job, first / all);
    set_wave(unit);
    Progress progress{-1, job.depth};
    Draw draw = draw_of(job.args.noise, 0);
    int sample = 0;
    FLATLORA_NO_UNROLL
    for (; unit.at.wave < job.waves; advance(unit, job.stride_steps, job.stride_units)) {
      const Place p = place_of(unit);
      if (p.sample != sample) draw = draw_of(job.args.noise, sample = p.sample);
      if (!p.inside || p.adapter) {
        make_room(unit, progress);
        if (p.inside) store_adapter(p, in_ring(unit));
      } else if (is_whole(unit)) {
        draw_unit<true>(unit, p, draw, progress);
      } else {
        draw_unit<false>(unit, p, draw, progress);
      }
    }
    if (progress.last >= 0) tell(job.drawn + progress.last);
  }

  // --- The warp that sends for tiles ---

  FLATLORA_DEVICE void send(const gpu::TensorMap* a_map, const gpu::TensorMap* u_map,
                            const gpu::TensorMap* w_map) const {
    Stage stage;
    AheadStep at;
    int sent = 0, behind = 0;  // behind: the slot of the next step to be told of as read
    if (!kInputGrad && job.args.lora_A != nullptr && has_tile(0))
      await([this](int i, bool wait) { return i == 0 && counted(job.made, uint32_t(gpu::blocks()), wait); });
    const auto tell_read = [&] {
      gpu::add_release(job.read + behind, 1);
      if (++behind == job.depth) behind = 0;
    };
    FLATLORA_NO_UNROLL
    for (; has_tile(at.wave);) {
      const int tile = tile_of(at.wave), column = tile / job.tiles_m, of_wave = column - first_column(at.wave);
      const int first_m = sample_of(column) * int(job.rows_per_sample) + tile % job.tiles_m * AheadTile::m;
      int ready = 0;
      FLATLORA_NO_UNROLL
      for (int step = 0; step < job.steps; ++step, ++sent, stage.advance(), at.advance(job, 1)) {
        if (step == ready) {
          ready += await([&](int i, bool wait) {
            const bool wraps = at.slot + i >= job.depth;
            const int64_t slot = at.slot + i - (wraps ? job.depth : 0);
            const uint32_t least = uint32_t(kUnits) * uint32_t(at.use + wraps + 1);
            return i < job.depth && step + i < job.steps && counted(job.drawn + slot * job.wide + of_wave, least, wait);
          });
        }
        if (gpu::lane() == 0) {
          gpu::mbarrier_wait(empty(stage.slot), stage.parity ^ 1);
          const bool adapter = step < job.lora_steps;
          const int k = (step - (adapter ? 0 : job.lora_steps)) * AheadTile::k;
          gpu::mbarrier_arrive_expect(full(stage.slot), kStageBytes);
          gpu::tma_load(a_stage(stage.slot), adapter ? u_map : a_map, k, first_m, full(stage.slot));
          gpu::tma_load(w_stage(stage.slot), w_map, 0, (at.slot * job.wide + of_wave) * kTile.n, full(stage.slot));
          if (sent >= kStages) tell_read();  // after that, because it takes a while
        }
      }
    }
    if (gpu::lane() != 0) return;
    FLATLORA_NO_UNROLL
    for (int i = 0; i < kStages; ++i, stage.advance()) {
      gpu::mbarrier_wait(empty(stage.slot), stage.parity ^ 1);
      if (sent + i >= kStages) tell_read();
    }
  }

  // --- Warpgroups that multiply ---

  using Accumulators = float[kHalves][64];

  FLATLORA_DEVICE static void hold(Accumulators& acc) {
    FLATLORA_UNROLL
    for (int i = 0; i < kHalves; ++i) gpu::wgmma_hold(acc[i]);
  }

  // PTX's matrix descriptor with the 128-byte swizzle. `box`: bytes from 64 columns to the next 64, where the
  // contraction lies across lines.
  FLATLORA_DEVICE static uint64_t describe(gpu::Shared p, uint32_t box) {
    const uint64_t eight_lines = 1024 >> 4;
    return uint64_t(1) << 62 | eight_lines << 32 | uint64_t(box >> 4) << 16 | (p & 0x3ffff) >> 4;
  }

  // kTransposed: a line of W is a step of the contraction, else an output.
  template <bool kTransposed>
  FLATLORA_DEVICE void multiply(Accumulators& acc, uint32_t slot) const {
    const uint32_t row = uint32_t(gpu::uniform(gpu::warp() / 4)) * 64;
    const uint64_t a = describe(a_stage(slot) + row * kLineBytes, 16);
    const uint64_t w = describe(w_stage(slot), kTransposed ? 64 * kLineBytes : 16);
    hold(acc);
    gpu::wgmma_fence();
    FLATLORA_UNROLL
    for (int piece = 0; piece < 4; ++piece) {
      FLATLORA_UNROLL
      for (int i = 0; i < kHalves; ++i)
        gpu::wgmma<kTransposed>(
            acc[i], a + (piece * 32 >> 4),
            w + ((i * 128 * kLineBytes + (kTransposed ? piece * 16 * kLineBytes : piece * 32)) >> 4), 1, T{});
    }
    gpu::wgmma_commit();
  }

  FLATLORA_DEVICE void release(uint32_t slot) const {
    if (gpu::lane() == 0) gpu::mbarrier_arrive(empty(slot));
  }

  FLATLORA_DEVICE void consume(const gpu::TensorMap* y_map) const {
    if (!kInputGrad && job.args.lora_A != nullptr) make_u();
    Stage stage;
    FLATLORA_NO_UNROLL
    for (int wave = 0; has_tile(wave); ++wave) {
      Accumulators acc;
      FLATLORA_UNROLL
      for (int i = 0; i < kHalves; ++i) {
        FLATLORA_UNROLL
        for (int j = 0; j < 64; ++j) acc[i][j] = 0.0f;
      }
      int step = 0;
      FLATLORA_NO_UNROLL
      for (; step < job.lora_steps; ++step, stage.advance()) {
        gpu::mbarrier_wait(full(stage.slot), stage.parity);
        multiply<false>(acc, stage.slot);
        gpu::wgmma_wait<0>();
        hold(acc);
        release(stage.slot);
      }
      // Always, because after a branch here the compiler would wait for each wgmma of the loop.
      const float scaling = job.lora_steps > 0 ? float(job.args.scaling) : 1.0f;
      FLATLORA_UNROLL
      for (int i = 0; i < kHalves; ++i) {
        FLATLORA_UNROLL
        for (int j = 0; j < 64; ++j) acc[i][j] *= scaling;
      }
      uint32_t before = stage.slot;
      FLATLORA_NO_UNROLL
      for (; step < job.steps; ++step, stage.advance()) {
        gpu::mbarrier_wait(full(stage.slot), stage.parity);
        multiply<kInputGrad>(acc, stage.slot);
        gpu::wgmma_wait<1>();
        hold(acc);
        if (step > job.lora_steps) release(before);
        before = stage.slot;
      }
      gpu::wgmma_wait<0>();
      hold(acc);
      release(before);
      store(acc, tile_of(wave), y_map);
    }
    if (gpu::lane() == 0) gpu::tma_store_wait<0>();
  }

  // 64 columns of the warp's 16 rows at a time, in two buffers. The map ends with the sample's rows.
  FLATLORA_DEVICE void store(Accumulators& acc, int tile, const gpu::TensorMap* y_map) const {
    const int column = tile / job.tiles_m, out_at = first_out(column);
    const int row = tile % job.tiles_m * AheadTile::m + gpu::warp() * AheadTile::kOutLines;
    const gpu::Shared mine = out() + uint32_t(gpu::warp()) * 2 * AheadTile::kOutBytes;
    const auto line = uint32_t(gpu::lane() % 16), upper = uint32_t(gpu::lane() / 16);
    // The same, but made here and not kept beside the accumulators.
    const gpu::Shared first = gpu::shuffle_xor(mine + line * 128 + ((upper ^ line % 8) << 4), 0);
    FLATLORA_UNROLL
    for (int part = 0; part < kTile.n / 64; ++part) {
      const uint32_t buffer = uint32_t(part % 2) * AheadTile::kOutBytes;
      float* const columns = acc[part / 2] + part % 2 * 32;
      if (job.args.bias != nullptr) add_bias(columns, out_at + part * 64);
      if (gpu::lane() == 0) gpu::tma_store_wait_read<1>();
      gpu::sync_warp();
      FLATLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float* v = columns + i * 8;
        const uint32_t w[4] = {pack(T{}, v[0], v[1]), pack(T{}, v[2], v[3]), pack(T{}, v[4], v[5]),
                               pack(T{}, v[6], v[7])};
        gpu::stmatrix((first ^ uint32_t(i) << 5) + buffer, w);
      }
      gpu::fence_proxy_async();
      gpu::sync_warp();
      if (gpu::lane() == 0) gpu::tma_store(y_map, out_at + part * 64, row, sample_of(column), mine + buffer);
    }
  }

  // Of 64 columns; `v` is theirs.
  FLATLORA_DEVICE void add_bias(float* v, int out_at) const {
    const uint16_t* bias = static_cast<const uint16_t*>(job.args.bias) + out_at + gpu::lane() % 4 * 2;
    uint32_t words[8];
    FLATLORA_UNROLL
    for (int i = 0; i < 8; ++i) words[i] = out_at + i * 8 < job.outputs ? gpu::load_global<uint32_t>(bias + i * 8) : 0;
    FLATLORA_UNROLL
    for (int i = 0; i < 8; ++i) {
      float even, odd;
      unpack(T{}, words[i], even, odd);
      FLATLORA_UNROLL
      for (int half = 0; half < 4; half += 2) v[i * 4 + half] += even, v[i * 4 + half + 1] += odd;
    }
  }
};

template <class T, bool kInputGrad, Noise kNoise, int kConfig>
FLATLORA_KERNEL(AheadTile::kThreads, 1)
linear_sm90_ahead_kernel(const FLATLORA_GRID_CONSTANT gpu::TensorMap a_map,
                         const FLATLORA_GRID_CONSTANT gpu::TensorMap u_map,
                         const FLATLORA_GRID_CONSTANT gpu::TensorMap w_map,
                         const FLATLORA_GRID_CONSTANT gpu::TensorMap y_map, const FLATLORA_GRID_CONSTANT AheadJob job) {
  Ahead<T, kInputGrad, kNoise, kConfig>(job).run(&a_map, &u_map, &w_map, &y_map);
}

struct AheadMaps {
  gpu::TensorMap a, u, w, y;
};

// Of one type, in the file named after it.
template <class T, bool kInputGrad, Noise kNoise>
gpu::Error launch_ahead_config(int config, const gpu::Launch& how, const AheadMaps& maps, const AheadJob& job) {
  const auto kernel = config == kAheadLarge ? linear_sm90_ahead_kernel<T, kInputGrad, kNoise, kAheadLarge>
                                            : linear_sm90_ahead_kernel<T, kInputGrad, kNoise, kAheadSmall>;
  return gpu::launch(kernel, how, maps.a, maps.u, maps.w, maps.y, job);
}

template <class T, bool kInputGrad>
gpu::Error launch_ahead_noise(int config, const gpu::Launch& how, const AheadMaps& maps, const AheadJob& job) {
  switch (static_cast<Noise>(job.args.noise.kind)) {
    case Noise::kGaussian: return launch_ahead_config<T, kInputGrad, Noise::kGaussian>(config, how, maps, job);
    case Noise::kNearGaussian: return launch_ahead_config<T, kInputGrad, Noise::kNearGaussian>(config, how, maps, job);
    default: return launch_ahead_config<T, kInputGrad, Noise::kRademacher>(config, how, maps, job);
  }
}

template <class T>
gpu::Error launch_linear_ahead(int config, const gpu::Launch& how, const AheadMaps& maps, const AheadJob& job);

#define FLATLORA_LINEAR_AHEAD(T)                                                                                      \
  template <>                                                                                                         \
  gpu::Error launch_linear_ahead<T>(int config, const gpu::Launch& how, const AheadMaps& maps, const AheadJob& job) { \
    return job.args.input_grad ? launch_ahead_noise<T, true>(config, how, maps, job)                                  \
                               : launch_ahead_noise<T, false>(config, how, maps, job);                                \
  }

}  // namespace flatlora
