// The product of hadamard noise alone, y = a eps^T or in the input gradient a eps, by fast Walsh transforms:
//
//   y[o] = sum over tiles of inputs of out_factor[o] * (P (in_factor * a[tile]))[o mod T],
//   P[i, j] = (-1)^popcount(reverse(i) & j)
//
// The factors are a tile's signs, on the side of the weight's rows times what multiplies the noise. P is symmetric, so
// both directions are one.
//
// The transform is Stockham's: a stage adds and subtracts what lies half the tile apart, and the new bit of the
// result's index goes above those of the stages before, so that the bits end in reverse order without a permutation.
#pragma once

#include "matmul.h"

namespace flatlora {
namespace FLATLORA_ISA {

constexpr int64_t kMostSide = 4096, kTransformRows = 16;
// Elements between one tile's room and the next: at a multiple of 4096 bytes a store would seem to hit a load.
constexpr int64_t kTileGap = 64;
constexpr int64_t kAhead = 2;  // rows: outputs are stored in jumps, where no hardware prefetcher follows

constexpr int log2_of(int x) { return x == 1 ? 0 : 1 + log2_of(x / 2); }
constexpr int reversed(int x, int bits) { return bits == 0 ? 0 : (x & 1) << (bits - 1) | reversed(x >> 1, bits - 1); }

constexpr int kFirstBits = log2_of(W);     // stages in which results lie closer than a vector
constexpr int kMostBits = W == 16 ? 4 : 3;  // stages of a pass: as many as 2^kMostBits vectors have registers

template <class T>
using TransformSum = std::conditional_t<sizeof(T) == 8, double, float>;

// Whether a transform goes in vectors; tiles smaller than one do not, nor does float64.
template <class T>
bool in_vectors(int bits) {
  return sizeof(T) < 8 && bits >= kFirstBits;
}

// The first stages take W^2 values at once. Where a tile has fewer, several rows go together; else one.
inline int64_t rows_together(int bits) { return max64(1, W * W >> bits); }

template <int kApart, int kCount>
SIMD void butterflies(F (&r)[kCount]) {
  for (int i = 0; i < kCount; ++i)
    if ((i & kApart) == 0) {
      const F x = r[i], y = r[i + kApart];
      r[i] = add(x, y);
      r[i + kApart] = sub(x, y);
    }
  if constexpr (kApart > 1) butterflies<kApart / 2>(r);
}

// The first kFirstBits stages: get(j) gives vectors of inputs.
template <class Get>
SIMD void walsh_begin(int64_t side, const Get& get, float* out) {
  const int64_t step = side / W;
  for (int64_t j = 0; j < step; j += W) {
    F r[W], t[W];
    for (int h = 0; h < W; ++h) r[h] = get(h * step + j);
    butterflies<W / 2>(r);
    for (int g = 0; g < W; ++g) t[g] = r[reversed(g, kFirstBits)];
    transpose(t);
    for (int c = 0; c < W; ++c) store(out + (j + c) * W, t[c]);
  }
}

// Stages [stage, stage + kBits): put(j, x) takes vectors of results.
template <int kBits, class Put>
SIMD void walsh_pass(const float* in, int64_t side, int stage, const Put& put) {
  constexpr int kCount = 1 << kBits;
  const int64_t step = side >> kBits, low = int64_t(1) << stage;
  for (int64_t j = 0; j < step; j += W) {
    F r[kCount];
    for (int h = 0; h < kCount; ++h) r[h] = load(in + h * step + j);
    butterflies<kCount / 2>(r);
    const int64_t to = ((j >> stage) << (stage + kBits)) + (j & (low - 1));
    for (int g = 0; g < kCount; ++g) put(to + g * low, r[reversed(g, kBits)]);
  }
}
template <class Put>
SIMD void walsh_pass(int bits, const float* in, int64_t side, int stage, const Put& put) {
  switch (bits) {
    case 1: return walsh_pass<1>(in, side, stage, put);
    case 2: return walsh_pass<2>(in, side, stage, put);
    case 3: return walsh_pass<3>(in, side, stage, put);
    default: return walsh_pass<kMostBits>(in, side, stage, put);
  }
}

inline void walsh_middle(int bits, const float* in, int64_t side, int stage, float* out) {
  walsh_pass(bits, in, side, stage, [=](int64_t j, F x) { store(out + j, x); });
}

// The stages that walsh_begin leaves, of `a`; b is room for a tile.
template <class Put>
SIMD void walsh_end(int bits, float* a, float* b, const Put& put) {
  const int64_t side = int64_t(1) << bits;
  int stage = kFirstBits;
  for (int passes = (bits - stage + kMostBits - 1) / kMostBits; passes > 1; --passes) {
    const int now = (bits - stage + passes - 1) / passes;
    walsh_middle(now, a, side, stage, b);
    stage += now;
    float* t = a;
    a = b;
    b = t;
  }
  if (stage < bits) return walsh_pass(bits - stage, a, side, stage, put);
  for (int64_t j = 0; j < side; j += W) put(j, load(a + j));
}

// All stages of `a`, not in vectors. Returns where the result is, `a` or `b`.
template <class Sum>
Sum* walsh_scalar(int bits, Sum* a, Sum* b) {
  for (int stage = 0; stage < bits; ++stage) {
    const int64_t low = int64_t(1) << stage, half = int64_t(1) << (bits - 1);
    for (int64_t rest = 0; rest < half; rest += low)
      for (int64_t j = rest; j < rest + low; ++j) {
        const Sum x = a[j], y = a[j + half];
        b[j + rest] = x + y;
        b[j + rest + low] = x - y;
      }
    Sum* t = a;
    a = b;
    b = t;
  }
  return a;
}

// One side of the product: its indices in the whole weight, and where its signs come from.
struct Side {
  int64_t first, end;
  uint32_t which;
  int bits;

  bool rows() const { return which == kHadamardRows; }
  int64_t first_tile() const { return first >> bits; }
  int64_t tiles() const { return ((end - 1) >> bits) - first_tile() + 1; }
};
inline Side transform_side(const TransformArgs& args, bool rows) {
  const int bits = int(args.noise.tile_bits);
  const int64_t first = rows ? args.noise.row_offset : args.noise.col_offset;
  return {first, first + (rows ? args.N : args.K), rows ? kHadamardRows : kHadamardCols, bits};
}

// What a call has of a tile, in indices of the tile.
struct Part {
  int64_t begin, end;
};
inline Part part_of(const Side& side, int64_t tile) {
  const int64_t origin = tile << side.bits;
  return {max64(side.first - origin, 0), min64(side.end - origin, int64_t(1) << side.bits)};
}

// Factors of a part of a tile, at the tile's indices.
template <class T, class Sum>
void make_factors(const Draw& d, const Side& side, int64_t tile, Part part, int64_t other_tile, Sum* factors) {
  const int64_t origin = tile << side.bits, first = (origin + part.begin) & ~int64_t(127);
  uint32_t signs[kMostSide / 32 + 4];
  draw_tile_signs(d, side.which, uint32_t(origin + part.begin), part.end - part.begin, uint32_t(other_tile), signs);
  int64_t j = part.begin;
  const auto one_by_one = [&](int64_t end) {
    for (; j < end; ++j) {
      const float factor = side.rows() ? d.factor(origin + j - side.first) : 1.0f;
      factors[j] = bit_of(signs, uint32_t(origin + j - first)) ? -factor : factor;
    }
  };
  if constexpr (sizeof(T) < 8) {
    if (in_vectors<T>(side.bits) && (!side.rows() || d.scale_stride == 1)) {
      one_by_one(min64(part.end, ceil_div(j, W) * W));
      for (; j + W <= part.end; j += W) {
        const uint8_t* bits = reinterpret_cast<const uint8_t*>(signs) + (origin + j - first) / 8;
        F factor = flip_signs(side.rows() ? d.sign : 1.0f, bits);
        if (side.rows()) {
          F scale = load(d.scale + origin + j - side.first);
          if (d.round_factor) {
            bfloat16 rounded[W];
            store(rounded, scale);
            scale = load(rounded);
          }
          factor = mul(factor, scale);
        }
        store(factors + j, factor);
      }
    }
  }
  one_by_one(part.end);
}

// Elements of a tile's room; see rows_together.
inline int64_t tile_room(int bits) { return max64(int64_t(1) << bits, W * W) + kTileGap; }

// A task is some rows of `a` and one tile of outputs.
inline TransformPlan plan_transform(const TransformArgs& args, int64_t threads) {
  const Side in = transform_side(args, args.input_grad), out = transform_side(args, !args.input_grad);
  const int64_t groups = max64(args.noise.samples, 1);
  TransformPlan plan;
  // A task draws signs of its own: many rows to a task, but some tasks to a thread.
  plan.rows = max64(1, min64(kTransformRows, args.M * out.tiles() / (2 * threads)));
  plan.tasks = groups * ceil_div(args.M / groups, plan.rows) * out.tiles();
  const int64_t tiles = 4 + (in.tiles() > 1 ? plan.rows : 0);
  plan.workspace = tiles * tile_room(out.bits) * (DType(args.dtype) == DType::kFloat64 ? 8 : 4);
  return plan;
}

template <class T, bool kInputGrad>
void transform_task(const TransformArgs& args, const TransformPlan& plan, int64_t task, void* workspace) {
  using Sum = TransformSum<T>;
  const Side in = transform_side(args, kInputGrad), out = transform_side(args, !kInputGrad);
  const int bits = in.bits;
  const int64_t side = int64_t(1) << bits, room = tile_room(bits), outputs = kInputGrad ? args.K : args.N;
  const int64_t group_rows = args.M / max64(args.noise.samples, 1), batches = ceil_div(group_rows, plan.rows);
  const int64_t out_tile = out.first_tile() + task % out.tiles(), batch = task / out.tiles() % batches;
  const int64_t group = task / out.tiles() / batches;
  const int64_t m0 = group * group_rows + batch * plan.rows, rows = min64(plan.rows, (group + 1) * group_rows - m0);
  const Draw draw = make_draw(args.noise, group, args.dtype);
  const Part to = part_of(out, out_tile);

  Sum* in_factors = static_cast<Sum*>(workspace);
  Sum *out_factors = in_factors + room, *x = out_factors + room, *other = x + room, *sums = other + room;
  for (int64_t i = 0; i < in.tiles(); ++i) {
    const int64_t in_tile = in.first_tile() + i;
    const Part from = part_of(in, in_tile);
    const bool first = i == 0, last = i == in.tiles() - 1;
    make_factors<T>(draw, in, in_tile, from, out_tile, in_factors);
    make_factors<T>(draw, out, out_tile, to, in_tile, out_factors);
    // Both at the tile's indices, where they may begin before the row.
    const auto a_row = [&](int64_t m) {
      return static_cast<const T*>(args.a) + (m0 + m) * args.a_row_stride +
             ((in_tile << bits) - in.first) * args.a_col_stride;
    };
    const auto y_row = [&](int64_t m) {
      return static_cast<T*>(args.y) + (m0 + m) * outputs + (out_tile << bits) - out.first;
    };
    const auto input = [&](const T* a, int64_t j) -> Sum {
      return j < from.begin || j >= from.end ? 0 : in_factors[j] * to_float(a[j * args.a_col_stride]);
    };
    const auto finish = [&](T* y, Sum* sum, int64_t j, Sum value) {
      value *= out_factors[j];
      if (!first) value += sum[j];
      if (!last) {
        sum[j] = value;
        return;
      }
      if (args.add) value += to_float(y[j]);
      if constexpr (sizeof(T) == 8) {
        y[j] = value;
      } else {
        from_float(value, y[j]);
      }
    };
    if (!in_vectors<T>(bits)) {
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t j = 0; j < side; ++j) x[j] = input(a_row(m), j);
        const Sum* result = walsh_scalar(bits, x, other);
        for (int64_t j = to.begin; j < to.end; ++j) finish(y_row(m), sums + m * room, j, result[j]);
      }
    }
    if constexpr (sizeof(T) < 8) {
      const auto put_in = [&](int64_t m) {
        return [&, y = y_row(m), sum = sums + m * room](int64_t j, F value) {
          if (j < to.begin || j + W > to.end) {
            float lanes[W];
            store(lanes, value);
            for (int64_t lane = max64(0, to.begin - j); lane < min64(W, to.end - j); ++lane)
              finish(y, sum, j + lane, lanes[lane]);
            return;
          }
          __builtin_prefetch(y + kAhead * outputs + j, 1);
          value = mul(value, load(out_factors + j));
          if (!first) value = add(value, load(sum + j));
          if (!last) return store(sum + j, value);
          if (args.add) value = add(value, load(y + j));
          store(y + j, value);
        };
      };
      const int64_t together = rows_together(bits), step = side * together / W;
      const bool whole = args.a_col_stride == 1 && from.end - from.begin == side;
      for (int64_t m = 0; in_vectors<T>(bits) && m < rows; m += together) {
        const int64_t now = min64(together, rows - m);
        if (whole && together == 1) {
          const T* a = a_row(m);
          const auto get = [&](int64_t j) {
            __builtin_prefetch(a + kAhead * args.a_row_stride + j);
            return mul(load(in_factors + j), load(a + j));
          };
          walsh_begin(side, get, other);
        } else {
          // Of each W-th part of a tile the rows side by side.
          for (int64_t i = 0; i < now; ++i) {
            const T* a = a_row(m + i);
            for (int64_t j = 0; whole && j < side; j += W) store(other + j, mul(load(in_factors + j), load(a + j)));
            for (int64_t j = 0; !whole && j < side; ++j) other[j] = input(a, j);
            for (int64_t part = 0; part < W; ++part)
              memcpy(x + part * step + i * (side / W), other + part * (side / W), size_t(side / W) * sizeof(float));
          }
          walsh_begin(side * together, [&](int64_t j) { return load(x + j); }, other);
        }
        for (int64_t i = 0; i < now; ++i) walsh_end(bits, other + i * side, x, put_in(m + i));
      }
    }
  }
}

}  // namespace FLATLORA_ISA
}  // namespace flatlora
