// The product of hadamard noise alone, y = a eps^T or in the input gradient a eps, by a fast Walsh transform. With the
// tiles of the layer's shorter side T,
//
//   y[o] = out_factor[o] * sum over tiles of inputs of (P (in_factor * a[tile]))[o mod T],
//   P[i, j] = (-1)^popcount(reverse(i) & j)
//
// where the factors are a tile's signs, and on the side of the weight's rows times what multiplies the noise. P is
// symmetric, so both directions are one.
#pragma once

#include "matmul.h"

namespace flatlora {
namespace FLATLORA_ISA {

constexpr int64_t kMostSide = 4096, kTransformRows = 16;

template <class T>
using SumOf = std::conditional_t<sizeof(T) == 8, double, float>;

// One side of the product: its indices in the weight, and where its signs come from.
struct Side {
  int64_t first, end;  // global
  uint32_t which;
  bool rows;
};

inline Side transform_side(const TransformArgs& args, bool rows) {
  if (rows) return {args.noise.row_offset, args.noise.row_offset + args.N, kHadamardRows, true};
  return {args.noise.col_offset, args.noise.col_offset + args.K, kHadamardCols, false};
}

inline int64_t tiles_of(const Side& side, int64_t bits) {
  return side.first == side.end ? 0 : ((side.end - 1) >> bits) - (side.first >> bits) + 1;
}

inline TransformPlan plan_transform(const TransformArgs& args, int64_t threads) {
  const int64_t bits = args.noise.tile_bits, tile = int64_t(1) << bits, groups = max64(args.noise.samples, 1);
  const Side out = transform_side(args, !args.input_grad), in = transform_side(args, args.input_grad);
  TransformPlan plan;
  plan.rows = max64(1, min64(kTransformRows, ceil_div(args.M * tiles_of(out, bits), 2 * threads)));
  plan.tasks = groups * ceil_div(args.M / groups, plan.rows) * tiles_of(out, bits);
  const int64_t rows = tiles_of(in, bits) > 1 ? plan.rows : 0;
  plan.workspace = (4 + rows) * (tile + 64) * (DType(args.dtype) == DType::kFloat64 ? 8 : 4);
  return plan;
}

// The part of tile `tile` of `side` that this call has: factors of [begin, end) within the tile, from that of begin on.
struct Part {
  int64_t begin, end;
};
template <class Acc>
Part make_factors(const Draw& d, const Side& side, int64_t tile, int64_t other_tile, Acc* factors) {
  const int bits = d.tile_bits;
  const int64_t origin = tile << bits;
  const Part part = {max64(side.first - origin, 0), min64(side.end - origin, int64_t(1) << bits)};
  uint32_t signs[kMostSide / 32 + 4];
  const uint32_t first = uint32_t(origin + part.begin);
  draw_tile_signs(d, side.which, first, part.end - part.begin, uint32_t(other_tile), signs);
  for (int64_t i = 0; i < part.end - part.begin; ++i) {
    const float factor = side.rows ? d.factor(origin + part.begin + i - side.first) : 1.0f;
    factors[i] = bit_of(signs, (first & 127) + uint32_t(i)) ? -factor : factor;
  }
  return part;
}

// Stages [first, bits) of the transform of `a`: each puts one more bit of the result's index above those of the stages
// before. Returns where the result is, `a` or `b`.
template <class Acc>
Acc* walsh(Acc* a, Acc* b, int first, int bits) {
  const int64_t half = bits ? int64_t(1) << (bits - 1) : 0;
  for (int stage = first; stage < bits; ++stage) {
    const int64_t low = int64_t(1) << stage;
    for (int64_t rest = 0; rest < half; rest += low)
      for (int64_t j = rest; j < rest + low; ++j) {
        const Acc x = a[j], y = a[j + half];
        b[j + rest] = x + y;
        b[j + rest + low] = x - y;
      }
    Acc* t = a;
    a = b;
    b = t;
  }
  return a;
}

template <class T, bool kInputGrad>
void transform_task(const TransformArgs& args, const TransformPlan& plan, int64_t task, void* workspace) {
  using Acc = SumOf<T>;
  const int bits = int(args.noise.tile_bits);
  const int64_t tile = int64_t(1) << bits, room = tile + 64, outputs = kInputGrad ? args.K : args.N;
  const Side in = transform_side(args, kInputGrad), out = transform_side(args, !kInputGrad);
  const int64_t out_tiles = tiles_of(out, bits), in_tiles = tiles_of(in, bits);
  const int64_t group_rows = args.M / max64(args.noise.samples, 1), batches = ceil_div(group_rows, plan.rows);
  const int64_t out_tile = (out.first >> bits) + task % out_tiles, batch = task / out_tiles % batches;
  const int64_t group = task / out_tiles / batches;
  const int64_t m0 = group * group_rows + batch * plan.rows, rows = min64(plan.rows, (group + 1) * group_rows - m0);
  const Draw draw = make_draw(args.noise, group, args.dtype);

  Acc* in_factors = static_cast<Acc*>(workspace);
  Acc *out_factors = in_factors + room, *buffer = out_factors + room, *sums = buffer + 2 * room;
  for (int64_t i = 0; i < in_tiles; ++i) {
    const int64_t in_tile = (in.first >> bits) + i;
    const Part from = make_factors(draw, in, in_tile, out_tile, in_factors);
    const Part to = make_factors(draw, out, out_tile, in_tile, out_factors);
    for (int64_t m = 0; m < rows; ++m) {
      const T* a = static_cast<const T*>(args.a) + (m0 + m) * args.a_row_stride +
                   ((in_tile << bits) + from.begin - in.first) * args.a_col_stride;
      for (int64_t j = 0; j < from.begin; ++j) buffer[j] = 0;
      for (int64_t j = from.begin; j < from.end; ++j)
        buffer[j] = in_factors[j - from.begin] * to_float(a[(j - from.begin) * args.a_col_stride]);
      for (int64_t j = from.end; j < tile; ++j) buffer[j] = 0;
      const Acc* result = walsh(buffer, buffer + room, 0, bits) + to.begin;
      Acc* sum = sums + m * room;
      T* y = static_cast<T*>(args.y) + (m0 + m) * outputs + (out_tile << bits) + to.begin - out.first;
      for (int64_t j = 0; j < to.end - to.begin; ++j) {
        Acc x = out_factors[j] * result[j];
        if (i > 0) x += sum[j];
        if (i < in_tiles - 1) {
          sum[j] = x;
        } else {
          if (args.add) x += to_float(y[j]);
          if constexpr (sizeof(T) == 8) {
            y[j] = x;
          } else {
            from_float(x, y[j]);
          }
        }
      }
    }
  }
}

}  // namespace FLATLORA_ISA
}  // namespace flatlora
