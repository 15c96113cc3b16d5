// The fused product. Forward and input gradient are one loop:
//
//   y[m, o] = sum_c a[m, c] P[c, o] + scaling sum_j u[m, j] L[o, j] + bias[o]
//
// A task owns a block of outputs `o`. It draws panels P[chunk of c, block] of W + eps into its core's own cache, each
// once, and multiplies all rows of `a` by a panel before it draws the next; the low-rank term enters as r more steps
// of the contraction. Sums stay in float32 (float64 for float64) until the epilogue rounds once.
#pragma once

#include <type_traits>

#include "tile.h"

namespace flatlora {
namespace FLATLORA_ISA {

constexpr int kRows = 6;  // rows of `a` per microkernel, at most
#if defined(__AVX512F__)
constexpr int kSums = 24;  // vectors of sums, of 32 registers
#else
constexpr int kSums = 12;  // of 16
#endif
constexpr int kMaxVectors = kSums / kRows;
// Partial sums of so many steps: one chain of all K roundings errs 2 to 6 times as much as a vendor product.
constexpr int64_t kSumSteps = 64;
constexpr int64_t kMaxBlock = kRegionShort, kPanelBytes = 256 << 10;

// Asks for the rows below, which the next call reads: rows lie pages apart, and no hardware prefetcher looks there.
template <int kR, class T>
SIMD void prefetch_below(const T* a, int64_t lda, int64_t steps) {
  for (int m = kR; m < 2 * kR; ++m)
    for (int64_t c = 0; c < min64(steps, kSumSteps); c += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(a + m * lda + c, 0, 2);
}

// A way to multiply: what `a` and a panel hold, and what is summed in. kPack contraction steps share one panel entry.
struct Float32 {
  using A = float;
  using Panel = float;
  using Acc = float;
  static constexpr int kPack = 1;

  template <int kR, int kV>
  static void multiply(const A* a, int64_t lda, const Panel* p, int64_t steps, Acc* acc) {
    F sums[kR][kV];
    for (int64_t c0 = 0; c0 < steps; c0 += kSumSteps) {
      for (int m = 0; m < kR; ++m)
        for (int v = 0; v < kV; ++v) sums[m][v] = splat(F(), 0.0f);
      prefetch_below<kR>(a + c0, lda, steps - c0);
      for (int64_t c = c0; c < min64(steps, c0 + kSumSteps); ++c, p += kV * W) {
        F b[kV];
        for (int v = 0; v < kV; ++v) b[v] = load(p + v * W);
        for (int m = 0; m < kR; ++m) {
          const F x = splat(F(), a[m * lda + c]);
          for (int v = 0; v < kV; ++v) sums[m][v] = fma(x, b[v], sums[m][v]);
        }
      }
      for (int m = 0; m < kR; ++m)
        for (int v = 0; v < kV; ++v) {
          Acc* sum = acc + (m * kV + v) * W;
          store(sum, add(load(sum), sums[m][v]));
        }
    }
  }
};

struct Float64 {
  using A = double;
  using Panel = double;
  using Acc = double;
  static constexpr int kPack = 1;

  template <int kR, int kV>
  static void multiply(const A* a, int64_t lda, const Panel* p, int64_t steps, Acc* acc) {
    for (int64_t c0 = 0; c0 < steps; c0 += kSumSteps) {
      Acc sums[kR * kV * W] = {};
      for (int64_t c = c0; c < min64(steps, c0 + kSumSteps); ++c, p += kV * W)
        for (int m = 0; m < kR; ++m)
          for (int i = 0; i < kV * W; ++i) sums[m * kV * W + i] += a[m * lda + c] * p[i];
      for (int i = 0; i < kR * kV * W; ++i) acc[i] += sums[i];
    }
  }
};

#if defined(__AVX512BF16__)
struct BFloat16Pairs {
  using A = bfloat16;
  using Panel = uint32_t;  // steps 2i (low half) and 2i + 1
  using Acc = float;
  static constexpr int kPack = 2;

  template <int kR, int kV>
  static void multiply(const A* a, int64_t lda, const Panel* p, int64_t steps, Acc* acc) {
    __m512 sums[kR][kV];
    for (int m = 0; m < kR; ++m)
      for (int v = 0; v < kV; ++v) sums[m][v] = load(acc + (m * kV + v) * W).v;
    for (int64_t c = 0; c < steps; c += 2, p += kV * W) {
      if (c % kSumSteps == 0) prefetch_below<kR>(a + c, lda, steps - c);
      __m512bh b[kV];
      for (int v = 0; v < kV; ++v) b[v] = (__m512bh)_mm512_loadu_si512(p + v * W);
      for (int m = 0; m < kR; ++m) {
        int pair;
        memcpy(&pair, a + m * lda + c, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < kV; ++v) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], x, b[v]);
      }
    }
    for (int m = 0; m < kR; ++m)
      for (int v = 0; v < kV; ++v) store(acc + (m * kV + v) * W, F{sums[m][v]});
  }
};

SIMD void store_pair(uint32_t* p, F low, F high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);  // low in elements 0..15
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, halves));
}
#endif

template <class Mode, int kV, int kR = kSums / kV < kRows ? kSums / kV : kRows>
void multiply_rows(int64_t rows, const typename Mode::A* a, int64_t lda, const typename Mode::Panel* p, int64_t steps,
                   typename Mode::Acc* acc) {
  if constexpr (kR > 1) {
    if (rows < kR) return multiply_rows<Mode, kV, kR - 1>(rows, a, lda, p, steps, acc);
  }
  Mode::template multiply<kR, kV>(a, lda, p, steps, acc);
}

// acc: (rows, vectors * W)
template <class Mode>
void multiply(int64_t rows, int vectors, const typename Mode::A* a, int64_t lda, const typename Mode::Panel* p,
              int64_t steps, typename Mode::Acc* acc) {
  switch (vectors) {
    case 1: return multiply_rows<Mode, 1>(rows, a, lda, p, steps, acc);
    case 2: return multiply_rows<Mode, 2>(rows, a, lda, p, steps, acc);
    case 4: return multiply_rows<Mode, 4>(rows, a, lda, p, steps, acc);
    default: return multiply_rows<Mode, int(kMaxBlock / W)>(rows, a, lda, p, steps, acc);
  }
}

// A block of outputs as a panel stores it: strips of `vectors * W` outputs, each (contraction, vectors * W).
struct Strips {
  int64_t width;  // outputs in use
  int vectors;
  int64_t strip() const { return vectors * W; }
  int64_t count() const { return ceil_div(width, strip()); }
  int64_t padded() const { return count() * strip(); }
};

// As wide as the registers take the sums of so many rows: with few rows, the steps of one sum wait for each other.
inline Strips make_strips(int64_t width, int64_t rows) {
  Strips s = {width, 1};
  while (s.strip() < width && 2 * s.vectors * min64(rows, kRows) <= kSums) s.vectors *= 2;
  return s;
}

SIMD void store_steps(float* panel, int64_t step, int64_t strip, int64_t steps, F (&r)[W]) {
  for (int i = 0; i < W; ++i)
    if (i < steps) store(panel + (step + i) * strip, r[i]);
}
SIMD void store_two_steps(float* panel, int64_t step, int64_t strip, F first, F second) {
  store(panel + step * strip, first);
  store(panel + (step + 1) * strip, second);
}
#if defined(__AVX512BF16__)
SIMD void store_two_steps(uint32_t* panel, int64_t step, int64_t strip, F first, F second) {
  store_pair(panel + step / 2 * strip, first, second);
}
SIMD void store_steps(uint32_t* panel, int64_t step, int64_t strip, int64_t steps, F (&r)[W]) {
  for (int i = 0; i < W; i += 2)
    if (i < steps) store_pair(panel + (step + i) / 2 * strip, r[i], i + 1 < steps ? r[i + 1] : splat(F(), 0.0f));
}
#endif

// A tile that comes by columns, two at a time, to be stored by rows; for want of a better way by a transpose.
template <class Panel>
struct Turned {
  F columns[W];
  SIMD void put(int j, F first, F second) { columns[j] = first, columns[j + 1] = second; }
  SIMD void store_to(Panel* panel, int64_t step, int64_t strip) {
    transpose(columns);
    store_steps(panel, step, strip, W, columns);
  }
};
#if defined(__AVX512BF16__)
// Rounded first: what is turned then are pairs of rows.
template <>
struct Turned<uint32_t> {
  __m512i columns[W / 2];
  SIMD void put(int j, F first, F second) { columns[j / 2] = (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v); }
  SIMD void store_to(uint32_t* panel, int64_t step, int64_t strip) {
    const __m512i low = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 16, 24, 17, 25, 18, 26, 19, 27);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
    __m512i t[8], s[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm512_unpacklo_epi32(columns[i], columns[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(columns[i], columns[i + 1]);
    }
    // s[g + q]: in 128-bit lanes 0 and 2 even and odd columns of pairs q, in lanes 1 and 3 of pairs 4 + q
    for (int g = 0; g < 8; g += 4)
      for (int h = 0; h < 2; ++h) {
        s[g + 2 * h] = _mm512_unpacklo_epi64(t[g + h], t[g + 2 + h]);
        s[g + 2 * h + 1] = _mm512_unpackhi_epi64(t[g + h], t[g + 2 + h]);
      }
    uint32_t* p = panel + step / 2 * strip;
    for (int q = 0; q < 4; ++q) {
      _mm512_storeu_si512(p + q * strip, _mm512_permutex2var_epi32(s[q], low, s[4 + q]));
      _mm512_storeu_si512(p + (4 + q) * strip, _mm512_permutex2var_epi32(s[q], high, s[4 + q]));
    }
  }
};
#endif

// A tile of gaussian noise on a weight given by columns. Each two columns go as soon as they are drawn: all would not
// stay in registers.
template <bool kInputGrad, class Panel, class T>
__attribute__((noinline)) void fill_by_columns(const T* columns, int64_t stride, const Draw& d, const RowLanes& lanes,
                                               int64_t k, int64_t step, int64_t strip, Panel* panel) {
  Turned<Panel> turned;
  each_two_columns(d, lanes, k, [&](int j, F even, F odd) {
    even = add(load(columns + j * stride), even);
    odd = add(load(columns + (j + 1) * stride), odd);
    if (kInputGrad) {
      turned.put(j, even, odd);
    } else {
      store_two_steps(panel, step + j, strip, even, odd);
    }
  });
  if (kInputGrad) turned.store_to(panel, step, strip);
}

// panel = W + eps at outputs [o0, o0 + width) and contraction [c0, c0 + steps); `stride` steps lie between strips.
template <bool kInputGrad, class Panel, class T>
void fill_region(const Weight<T>& w, const Draw& d, Strips s, int64_t o0, int64_t c0, int64_t steps, int64_t step0,
                 int64_t stride, int pack, Panel* panel) {
  const int64_t n0 = kInputGrad ? c0 : o0, k0 = kInputGrad ? o0 : c0;
  const int64_t rows = kInputGrad ? steps : s.width, cols = kInputGrad ? s.width : steps;
  Region region;
  RowLanes lanes;
  alignas(64) T room[W * kRegionLong];
  draw_region(d, n0, rows, k0, cols, region);
  for (int64_t n = 0; n < rows; n += W) {
    make_row_lanes(d, n0 + n, rows - n, region, lanes);
    const bool lanes_n = d.kind == Noise::kGaussian || (d.kind == Noise::kNone && !kInputGrad);
    const Weight<T> here = lanes_n ? decoded_columns(w, n0 + n, min64(W, rows - n), k0, cols, room)
                                   : decoded(w, n0 + n, min64(W, rows - n), k0, cols, room);
    const bool by_columns = d.kind == Noise::kGaussian && here.row_stride == 1 && here.col_stride != 1 && n + W <= rows;
    for (int64_t k = 0; k < cols; k += W) {
      prefetch_tile(w, n0 + n + (kInputGrad ? 2 * W : 0), k0 + k + (kInputGrad ? 0 : 8 * W));
      const int64_t o = kInputGrad ? k : n, c = kInputGrad ? n : k;
      Panel* strip = panel + o / s.strip() * (stride / pack) * s.strip() + o % s.strip();
      if (by_columns && k + W <= cols) {
        const T* columns = here.data + (n0 + n) + (k0 + k) * here.col_stride;
        fill_by_columns<kInputGrad>(columns, here.col_stride, d, lanes, k0 + k, step0 + c, s.strip(), strip);
        continue;
      }
      F r[W];
      perturbed_tile<!kInputGrad>(here, d, lanes, region, n0 + n, k0 + k, r);
      store_steps(strip, step0 + c, s.strip(), steps - c, r);
    }
  }
}

// float64 weights: eps in float32 as everywhere, added in float64. Not tuned.
template <bool kInputGrad>
void fill_region(const Weight<double>& w, const Draw& d, Strips s, int64_t o0, int64_t c0, int64_t steps, int64_t step0,
                 int64_t stride, int, double* panel) {
  const int64_t n0 = kInputGrad ? c0 : o0, k0 = kInputGrad ? o0 : c0;
  const int64_t rows = kInputGrad ? steps : s.width, cols = kInputGrad ? s.width : steps;
  const Weight<float> zero = {nullptr, 0, 0, w.N, w.K};
  Region region;
  RowLanes lanes;
  alignas(64) double room[W * kRegionLong];
  draw_region(d, n0, rows, k0, cols, region);
  for (int64_t n = 0; n < rows; n += W) {
    make_row_lanes(d, n0 + n, rows - n, region, lanes);
    const Weight<double> here = decoded(w, n0 + n, min64(W, rows - n), k0, cols, room);
    for (int64_t k = 0; k < cols; k += W) {
      F r[W];
      perturbed_tile<false>(zero, d, lanes, region, n0 + n, k0 + k, r);
      for (int64_t i = 0; i < min64(W, rows - n); ++i) {
        float eps[W];
        store(eps, r[i]);
        for (int64_t j = 0; j < min64(W, cols - k); ++j) {
          const int64_t o = kInputGrad ? k + j : n + i, c = step0 + (kInputGrad ? n + i : k + j);
          const double base =
              here.data ? here.data[(n0 + n + i) * here.row_stride + (k0 + k + j) * here.col_stride] : 0.0;
          panel[o / s.strip() * stride * s.strip() + c * s.strip() + o % s.strip()] = base + double(eps[j]);
        }
      }
    }
  }
}

// One panel, region by region; lanes past the last output are zero, and so is the odd step that a pair lacks.
template <bool kInputGrad, class Mode, class T>
void fill_panel(const Weight<T>& w, const Draw& d, Strips s, int64_t o0, int64_t c0, int64_t steps, int64_t stride,
                typename Mode::Panel* panel) {
  if (s.padded() - s.width >= W || sizeof(T) == 8)
    memset(panel, 0, size_t(s.padded() * (stride / Mode::kPack)) * sizeof(*panel));
  for (int64_t c = 0; c < steps; c += kRegionLong)
    fill_region<kInputGrad>(w, d, s, o0, c0 + c, min64(kRegionLong, steps - c), c, stride, Mode::kPack, panel);
}

SIMD double to_float(double x) { return x; }

// rows x steps of a strided matrix as contiguous rows of `lda`; the tail up to lda is zero.
template <class To, class From>
void pack(const From* p, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t steps, int64_t lda, To* out) {
  for (int64_t m = 0; m < rows; ++m, p += row_stride, out += lda) {
    int64_t c = 0;
    if constexpr (std::is_same_v<To, float> && sizeof(From) <= sizeof(float)) {
      for (; col_stride == 1 && c + W <= steps; c += W) store(out + c, load(p + c));
    }
    for (; c < steps; ++c) {
      if constexpr (std::is_same_v<To, From>) {
        out[c] = p[c * col_stride];
      } else {
        out[c] = To(to_float(p[c * col_stride]));
      }
    }
    for (; c < lda; ++c) out[c] = To();
  }
}

// The same from element `begin` of a matrix whose type is known at run time.
template <class To>
void pack(const void* p, int64_t dtype, int64_t begin, int64_t row_stride, int64_t col_stride, int64_t rows,
          int64_t steps, int64_t lda, To* out) {
  const auto typed = [&](auto* from) { pack(from + begin, row_stride, col_stride, rows, steps, lda, out); };
  switch (DType(dtype)) {
    case DType::kFloat32: return typed(static_cast<const float*>(p));
    case DType::kFloat64: return typed(static_cast<const double*>(p));
    case DType::kBFloat16: return typed(static_cast<const bfloat16*>(p));
    default: return typed(static_cast<const float16*>(p));
  }
}

template <class T>
SIMD void finish_row(const float* acc, const float* bias, int64_t width, T* y) {
  int64_t o = 0;
  for (; o + W <= width; o += W) store(y + o, add(load(acc + o), load(bias + o)));
  if (o < width) store(y + o, add(load(acc + o), load(bias + o)), int(width - o));
}
SIMD void finish_row(const double* acc, const double* bias, int64_t width, double* y) {
  for (int64_t o = 0; o < width; ++o) y[o] = acc[o] + bias[o];
}

// float32 and float64 carry sums between chunks in y itself; 16-bit outputs need a buffer of their own.
template <class T>
constexpr bool kCarryInY = sizeof(T) >= 4;

template <class Acc>
struct LoraModeOf {
  using type = Float32;
};
template <>
struct LoraModeOf<double> {
  using type = Float64;
};

struct Arena {
  char* p;
  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(p);
    p += ceil_div(count * int64_t(sizeof(T)), 64) * 64;
    return result;
  }
};

template <class Mode, class T>
int64_t workspace_bytes(const LinearArgs& args, int64_t block, int64_t chunk, int64_t rows) {
  using Acc = typename Mode::Acc;
  const auto line = [](int64_t bytes) { return ceil_div(bytes, 64) * 64; };
  const int64_t C = args.input_grad ? args.N : args.K;
  const bool carried = !kCarryInY<T> && chunk < C;
  return line(block * chunk / Mode::kPack * int64_t(sizeof(typename Mode::Panel))) +
         line(block * args.rank * int64_t(sizeof(Acc))) + line(kRows * chunk * int64_t(sizeof(typename Mode::A))) +
         line(kRows * args.rank * int64_t(sizeof(Acc))) +
         line((carried ? ceil_div(rows, kRows) * kRows : kRows) * block * int64_t(sizeof(Acc))) +
         line(block * int64_t(sizeof(Acc)));
}

template <class Mode, class T>
LinearPlan plan_mode(const LinearArgs& args, int64_t threads) {
  const int64_t C = args.input_grad ? args.N : args.K, outputs = args.input_grad ? args.K : args.N;
  const int64_t samples = max64(args.noise.samples, 1), M = max64(args.M / samples, 1);
  const int64_t whole = ceil_div(max64(C, 1), W) * W;
  // Too little workspace for all threads is a matter of small weights: fewer threads, so that sums group the same on
  // every machine.
  const int64_t least = workspace_bytes<Mode, T>(args, W, min64(whole, kSumSteps), kRows);
  threads = max64(1, min64(threads, args.workspace_limit / least));
  const int64_t limit = args.workspace_limit / threads;
  // Few rows: a panel that stays in L1. Many: one that stays in L2, and as long as that, for fewer trips of the sums.
  const int64_t column_bytes = kMaxBlock * int64_t(sizeof(typename Mode::Panel)) / Mode::kPack;
  const int64_t usual = min64(whole, M <= 32 ? 64 : kPanelBytes / column_bytes);
  LinearPlan plan = {kMaxBlock, usual, M, 1, 0, threads, 0};
  const auto fits = [&](int64_t block, int64_t chunk, int64_t rows) {
    return workspace_bytes<Mode, T>(args, block, chunk, rows) <= limit;
  };
  // Whole groups of kSumSteps; less only where one thread alone has no room for one.
  const auto halve = [](int64_t chunk, int64_t unit) { return max64(unit, chunk / 2 / unit * unit); };
  while (plan.block > 2 * W && samples * ceil_div(outputs, plan.block) < 3 * threads) plan.block /= 2;
  if (kCarryInY<T>) {
    while (!fits(plan.block, plan.chunk, M) && plan.chunk > kSumSteps) plan.chunk = halve(plan.chunk, kSumSteps);
    while (!fits(plan.block, plan.chunk, M) && plan.block > W) plan.block /= 2;
    while (!fits(plan.block, plan.chunk, M) && plan.chunk > W) plan.chunk = halve(plan.chunk, W);
  } else if (M > 512 || !fits(plan.block, plan.chunk, M)) {
    // A panel of the whole contraction carries nothing; a narrower one still draws each value once.
    for (int64_t block = plan.block; block >= W; block /= 2) {
      if (fits(block, whole, kRows)) {
        plan.block = block;
        plan.chunk = whole;
        break;
      }
    }
    if (plan.chunk < whole) {
      while (!fits(plan.block, plan.chunk, 16 * kRows) && plan.chunk > kSumSteps)
        plan.chunk = halve(plan.chunk, kSumSteps);
      while (!fits(plan.block, plan.chunk, kRows) && plan.block > W) plan.block /= 2;
      while (!fits(plan.block, plan.chunk, kRows) && plan.chunk > W) plan.chunk = halve(plan.chunk, W);
      const int64_t fixed = workspace_bytes<Mode, T>(args, plan.block, plan.chunk, 0);
      const int64_t per_row = plan.block * int64_t(sizeof(typename Mode::Acc));
      plan.rows = min64(M, max64(kRows, (limit - fixed) / per_row / kRows * kRows));
    }
  }
  plan.tasks = samples * ceil_div(outputs, plan.block);
  if (plan.tasks < threads) {
    // More cores than blocks: tasks share the rows, and each draws the block for itself.
    plan.parts = max64(1, min64(ceil_div(threads, plan.tasks), M / (16 * kRows)));
    plan.tasks *= plan.parts;
  }
  plan.workspace = workspace_bytes<Mode, T>(args, plan.block, plan.chunk, plan.rows);
  return plan;
}

template <class Mode, class T, bool kInputGrad>
void linear_task(const LinearArgs& args, const LinearPlan& plan, int64_t task, void* workspace) {
  using A = typename Mode::A;
  using Acc = typename Mode::Acc;
  using LoraMode = typename LoraModeOf<Acc>::type;
  const int64_t C = kInputGrad ? args.N : args.K, outputs = kInputGrad ? args.K : args.N, rank = args.rank;
  const int64_t blocks = ceil_div(outputs, plan.block), o0 = task % blocks * plan.block;
  const int64_t part = task / blocks % plan.parts, group = task / blocks / plan.parts;
  const int64_t group_rows = args.M / max64(args.noise.samples, 1);
  const int64_t part_rows = ceil_div(ceil_div(group_rows, plan.parts), kRows) * kRows;
  const Strips s = make_strips(min64(plan.block, outputs - o0), group_rows);
  const int64_t strip = s.strip(), tile = kRows * strip;
  const Draw draw = make_draw(args.noise, group, args.dtype);
  const Weight<T> weight = make_weight<T>(args.weight, args.N, args.K);
  const bool carried = !kCarryInY<T> && plan.chunk < C;

  Arena arena = {static_cast<char*>(workspace)};
  auto* panel = arena.take<typename Mode::Panel>(s.padded() * plan.chunk / Mode::kPack);
  Acc* lora_panel = arena.take<Acc>(s.padded() * rank);
  A* packed_a = arena.take<A>(kRows * plan.chunk);
  Acc* packed_u = arena.take<Acc>(kRows * rank);
  Acc* sums = arena.take<Acc>((carried ? ceil_div(plan.rows, kRows) * kRows : kRows) * s.padded());
  Acc* bias = arena.take<Acc>(s.padded());

  pack(args.bias, args.bias_dtype, o0 * args.bias_stride, 0, args.bias_stride, 1, args.bias ? s.width : 0, s.padded(),
       bias);
  for (int64_t o = 0; rank && o < s.width; o += strip)
    pack(args.lora, args.lora_dtype, (o0 + o) * args.lora_out_stride, args.lora_rank_stride, args.lora_out_stride, rank,
         min64(strip, s.width - o), strip, lora_panel + o * rank);
  for (int64_t i = 0; i < s.padded() * rank; ++i) lora_panel[i] = Acc(args.scaling * lora_panel[i]);

  const T* a = static_cast<const T*>(args.a) + group * group_rows * args.a_row_stride;
  const T* u = static_cast<const T*>(args.u) + group * group_rows * rank;
  T* y = static_cast<T*>(args.y) + group * group_rows * outputs + o0;

  const int64_t part_end = min64(group_rows, (part + 1) * part_rows);
  for (int64_t m0 = part * part_rows; m0 < part_end; m0 += plan.rows) {
    const int64_t m1 = min64(part_end, m0 + plan.rows);
    int64_t c0 = 0;
    do {
      const int64_t steps = min64(plan.chunk, C - c0), lda_packed = ceil_div(steps, Mode::kPack) * Mode::kPack;
      const bool first = c0 == 0, last = c0 + steps == C;
      // A pair reads one step past an odd end, which only a packed row has.
      const bool direct = sizeof(A) == sizeof(T) && args.a_col_stride == 1 && lda_packed == steps;
      fill_panel<kInputGrad, Mode>(weight, draw, s, o0, c0, steps, plan.chunk, panel);
      for (int64_t m = m0; m < m1; m += kRows) {
        const int64_t rows = min64(kRows, m1 - m);
        const T* a_m = a + m * args.a_row_stride + c0 * args.a_col_stride;
        const A* a_tile = reinterpret_cast<const A*>(a_m);
        int64_t lda = args.a_row_stride;
        if (!direct) {
          pack(a_m, args.a_row_stride, args.a_col_stride, rows, steps, lda_packed, packed_a);
          a_tile = packed_a;
          lda = lda_packed;
        }
        if (last && rank) pack(u + m * rank, rank, 1, rows, rank, rank, packed_u);
        for (int64_t i = 0; i < s.count(); ++i) {
          const int64_t width = min64(strip, s.width - i * strip);
          T* y_tile = y + m * outputs + i * strip;
          for (int64_t row = kRows; row < min64(2 * kRows, m1 - m); ++row)  // where the next tile's sums are or will be
            for (int64_t o = 0; o < width; o += 64 / int64_t(sizeof(T)))
              __builtin_prefetch(y_tile + row * outputs + o, 1, 2);
          Acc* acc = carried ? sums + ((m - m0) / kRows * s.count() + i) * tile : sums;
          if (first) {
            memset(acc, 0, size_t(tile) * sizeof(Acc));
          } else if (kCarryInY<T>) {
            for (int64_t row = 0; row < rows; ++row)
              memcpy(acc + row * strip, y_tile + row * outputs, size_t(width) * sizeof(T));
          }
          multiply<Mode>(rows, s.vectors, a_tile, lda, panel + i * (plan.chunk / Mode::kPack) * strip, steps, acc);
          if (last) {
            if (rank) multiply<LoraMode>(rows, s.vectors, packed_u, rank, lora_panel + i * rank * strip, rank, acc);
            for (int64_t row = 0; row < rows; ++row)
              finish_row(acc + row * strip, bias + i * strip, width, y_tile + row * outputs);
          } else if (kCarryInY<T>) {
            for (int64_t row = 0; row < rows; ++row)
              memcpy(static_cast<void*>(y_tile + row * outputs), acc + row * strip, size_t(width) * sizeof(T));
          }
        }
      }
      c0 += steps;
    } while (c0 < C);
  }
}

}  // namespace FLATLORA_ISA
}  // namespace flatlora
