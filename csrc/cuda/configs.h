// Tiles of linear_sm80.h and their choice. Nothing is timed at run time: the choice decides the order of sums.
#pragma once

#include <cstdint>

#include "../common/args.h"

namespace flatlora {

struct Tile {
  int m, n, k;           // rows of x, outputs, steps of the contraction
  int warps_m, warps_n;  // that share it
  int stages, blocks;    // blocks: on a multiprocessor at a time, as far as registers go

  constexpr int threads() const { return 32 * warps_m * warps_n; }
  constexpr int stage_bytes(int element) const { return (m + n) * k * element; }
  constexpr int shared_bytes(int element) const { return stages * stage_bytes(element); }
};

enum Config { kLarge, kMiddle, kAny, kFewRows, kConfigs };

// One value drawn serves all m rows, so a tile is as high as there are rows to fill it. Each thread perturbs 4 x 8
// elements in a step: n * k = 32 * threads. kAny takes all types and layouts, float32 has it and kFewRows.
constexpr Tile kTiles[kConfigs] = {
    {256, 128, 64, 4, 2, 3, 1},
    {128, 128, 64, 2, 4, 3, 1},
    {64, 64, 64, 2, 2, 3, 2},
    {16, 64, 64, 1, 4, 4, 4},
};

// `rows`: that see one sample. `regular`: what only kAny can do is not needed.
inline Config choose_config(int element, int64_t rows, bool regular, int64_t shared_limit) {
  if (!regular) return kAny;
  if (rows <= 16) return kFewRows;
  if (rows <= 64 || element == 4) return kAny;
  const bool large = rows > 128 && kTiles[kLarge].shared_bytes(element) + 1024 <= shared_limit;
  return large ? kLarge : kMiddle;
}

// Into how many parts the contraction is cut so that all processors have work.
inline int64_t choose_parts(const Tile& tile, int64_t tiles, int64_t steps, int64_t most, int64_t processors) {
  int64_t best = 1;
  double best_time = 0;
  for (int64_t parts = 1; parts == 1 || parts <= most; ++parts) {
    const int64_t blocks = (tiles * parts + processors - 1) / processors;
    // Two more steps for the beginning and end of each part.
    const double time = double(blocks > tile.blocks ? blocks : tile.blocks) * (double(steps) / double(parts) + 2);
    if (parts == 1 || time < best_time) {
      best = parts;
      best_time = time;
    }
  }
  return best;
}

}  // namespace flatlora
