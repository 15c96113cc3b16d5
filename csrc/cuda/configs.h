// Tiles of linear_sm80.h and their choice. Nothing is timed at run time: the choice decides the order of sums.
#pragma once

#include <cstdint>

#include "../common/args.h"

namespace flatlora {

struct Tile {
  int m, n, k;           // rows of x, outputs, steps of the contraction
  int warps_m, warps_n;  // that share it
  int stages, blocks;    // blocks: on a multiprocessor at a time, as far as registers go
  int cycles;            // predicted for one step, docs/internals/performance.md

  constexpr int threads() const { return 32 * warps_m * warps_n; }
  constexpr int stage_bytes(int element) const { return (m + n) * k * element; }
  constexpr int shared_bytes(int element) const { return stages * stage_bytes(element); }
  constexpr int rest_bytes(int element) const { return stages * n * k * element; }  // with split noise beside that
};

enum Config { kLarge, kMiddle, kAny, kFewRows, kConfigs };

// One value drawn serves all m rows, so a tile is as high as there are rows to fill it. Each thread perturbs 4 x 8
// elements in a step: n * k = 32 * threads. kAny takes all types and layouts, float32 has it and kFewRows.
constexpr Tile kTiles[kConfigs] = {
    {256, 128, 64, 4, 2, 3, 1, 2048},
    {128, 128, 64, 2, 4, 3, 1, 1280},
    {64, 64, 64, 2, 2, 3, 2, 512},
    {16, 64, 64, 1, 4, 4, 4, 512},
};

// What a block can have: 99 KiB on sm_86 and sm_89, 163 on sm_80, 227 from sm_90 on. `choose` asks for kLarge alone.
static_assert(kTiles[kMiddle].shared_bytes(2) + 1024 <= 99 << 10);
static_assert(kTiles[kAny].shared_bytes(4) + 1024 <= 99 << 10);
static_assert(kTiles[kFewRows].shared_bytes(4) + 1024 <= 99 << 10);
static_assert(kTiles[kAny].shared_bytes(2) + kTiles[kAny].rest_bytes(2) + 1024 <= 99 << 10);
static_assert(kTiles[kFewRows].shared_bytes(2) + kTiles[kFewRows].rest_bytes(2) + 1024 <= 99 << 10);
static_assert(kTiles[kLarge].shared_bytes(2) + 1024 <= 163 << 10);

// A product as the choice sees it: `samples` times `rows` rows of x, and how many parts may be summed.
struct Extent {
  int64_t samples, rows, outputs, length, most_parts;

  int64_t tiles(const Tile& t) const { return samples * ((rows + t.m - 1) / t.m) * ((outputs + t.n - 1) / t.n); }
  int64_t steps(const Tile& t) const { return (length + t.k - 1) / t.k; }
};

struct Choice {
  Config config;
  int64_t parts;  // into which the contraction is cut
  double cycles;
};

// The number of parts that gives all processors work.
inline Choice choose_parts(Config config, const Extent& e, int64_t processors) {
  const Tile& tile = kTiles[config];
  const int64_t most = e.most_parts < e.steps(tile) / 4 ? e.most_parts : e.steps(tile) / 4;
  Choice best = {config, 1, 0};
  for (int64_t parts = 1; parts == 1 || parts <= most; ++parts) {
    const int64_t blocks = (e.tiles(tile) * parts + processors - 1) / processors;
    // Two more steps for the beginning and end of each part.
    const double cycles =
        double(blocks > tile.blocks ? blocks : tile.blocks) * (double(e.steps(tile)) / double(parts) + 2) * tile.cycles;
    if (parts == 1 || cycles < best.cycles) best = {config, parts, cycles};
  }
  return best;
}

// `regular`: what only kAny can do is not needed. `small`: kAny and kFewRows alone exist.
inline Choice choose(int element, const Extent& e, bool regular, bool small, int64_t processors, int64_t shared_limit) {
  if (!regular) return choose_parts(kAny, e, processors);
  if (e.rows <= 16) return choose_parts(kFewRows, e, processors);
  if (e.rows <= 64 || small) return choose_parts(kAny, e, processors);
  const Choice middle = choose_parts(kMiddle, e, processors), large = choose_parts(kLarge, e, processors);
  const bool fits = kTiles[kLarge].shared_bytes(element) + 1024 <= shared_limit;
  return fits && e.rows > kTiles[kMiddle].m && large.cycles <= middle.cycles ? large : middle;
}

}  // namespace flatlora
