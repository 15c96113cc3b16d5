// The kernels of one instruction-set level; compiled once per level (see CMakeLists.txt).
#include "transform.h"

namespace flatlora {
namespace FLATLORA_ISA {

#if defined(__AVX512BF16__)
using BFloat16Mode = BFloat16Pairs;
#else
using BFloat16Mode = Float32;
#endif

LinearPlan plan_linear(const LinearArgs& args, int64_t threads) {
  switch (DType(args.dtype)) {
    case DType::kFloat32: return plan_mode<Float32, float>(args, threads);
    case DType::kFloat64: return plan_mode<Float64, double>(args, threads);
    case DType::kBFloat16:
      if (args.split_noise) return plan_mode<Float32, bfloat16>(args, threads);
      return plan_mode<BFloat16Mode, bfloat16>(args, threads);
    default: return plan_mode<Float32, float16>(args, threads);
  }
}

template <bool kInputGrad>
void linear_direction(const LinearArgs& args, const LinearPlan& plan, int64_t task, void* workspace) {
  switch (DType(args.dtype)) {
    case DType::kFloat32: return linear_task<Float32, float, kInputGrad>(args, plan, task, workspace);
    case DType::kFloat64: return linear_task<Float64, double, kInputGrad>(args, plan, task, workspace);
    case DType::kBFloat16:
      // W + eps in float32 costs what two products of bfloat16 would.
      if (args.split_noise) return linear_task<Float32, bfloat16, kInputGrad>(args, plan, task, workspace);
      return linear_task<BFloat16Mode, bfloat16, kInputGrad>(args, plan, task, workspace);
    default: return linear_task<Float32, float16, kInputGrad>(args, plan, task, workspace);
  }
}

void linear(const LinearArgs& args, const LinearPlan& plan, int64_t task, void* workspace) {
  if (args.input_grad) return linear_direction<true>(args, plan, task, workspace);
  linear_direction<false>(args, plan, task, workspace);
}

// Rows per task, and columns of W + scaling B A that are formed at a time: directly, because expanding the square
// cancels where B A is close to -W.
constexpr int64_t kNormRows = 16 * kRows, kNormCols = 128, kNormStrip = kMaxVectors * W;

int64_t row_norms_tasks(const RowNormsArgs& args) { return ceil_div(args.N, kNormRows); }

// Bytes per task: A, B and what add_squares cannot read in place.
int64_t row_norms_workspace(const RowNormsArgs& args) {
  return (args.rank * (kNormCols + kNormRows) + kRows * kNormCols) * int64_t(sizeof(double));
}

// The first n lanes; the others are zero.
SIMD F first_lanes(F x, int64_t n) {
  float lanes[W];
  store(lanes, x);
  return load(lanes, int(max64(0, min64(W, n))));
}

// total[m] += squares of w + B A over kRows rows and kNormCols columns. A: [strip][rank][kNormStrip], B: [row][rank].
// kCut: the weight ends after `cols` columns, and what is beyond does not count: an infinite B makes it NaN.
template <bool kCut, class T>
void add_squares(const T* w, int64_t stride, const float* A, const float* B, int64_t rank, int64_t cols,
                 double* total) {
  F squares[kRows];
  for (F& square : squares) square = splat(F(), 0.0f);
  for (int64_t k = 0; k < kNormCols; k += kNormStrip) {
    F x[kRows][kMaxVectors];
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < kMaxVectors; ++v) {
        x[m][v] = load(w + m * stride + k + v * W);
        __builtin_prefetch(w + m * stride + k + v * W + kNormCols, 0, 2);
      }
    for (int64_t j = 0; j < rank; ++j, A += kNormStrip) {
      F a[kMaxVectors];
      for (int v = 0; v < kMaxVectors; ++v) a[v] = load(A + v * W);
      for (int m = 0; m < kRows; ++m) {
        const F b = splat(F(), B[m * rank + j]);
        for (int v = 0; v < kMaxVectors; ++v) x[m][v] = fma(b, a[v], x[m][v]);
      }
    }
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < kMaxVectors; ++v) {
        if (kCut) x[m][v] = first_lanes(x[m][v], cols - k - v * W);
        squares[m] = fma(x[m][v], x[m][v], squares[m]);
      }
  }
  for (int m = 0; m < kRows; ++m) total[m] += sum(squares[m]);
}
template <bool kCut>
void add_squares(const double* w, int64_t stride, const double* A, const double* B, int64_t rank, int64_t cols,
                 double* total) {
  for (int m = 0; m < kRows; ++m)
    for (int64_t k = 0; k < cols; ++k) {
      double x = w[m * stride + k];
      for (int64_t j = 0; j < rank; ++j)
        x += B[m * rank + j] * A[(k / kNormStrip * rank + j) * kNormStrip + k % kNormStrip];
      total[m] += x * x;
    }
}

// total += squares of a piece of a contiguous row, for want of an adapter: four sums, because one would wait for its
// own additions.
constexpr int64_t kSquarePiece = 64 * W;
template <class T>
void add_squares(const T* p, int64_t cols, double& total) {
  int64_t k = 0;
  if (cols >= 4 * W) {
    F squares[4] = {splat(F(), 0.0f), splat(F(), 0.0f), splat(F(), 0.0f), splat(F(), 0.0f)};
    for (; k + 4 * W <= cols; k += 4 * W)
      for (int i = 0; i < 4; ++i) {
        const F x = load(p + k + i * W);
        squares[i] = fma(x, x, squares[i]);
      }
    total += sum(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
  }
  for (; k < cols; ++k) total += double(to_float(p[k])) * to_float(p[k]);
}
inline void add_squares(const double* p, int64_t cols, double& total) {
  for (int64_t k = 0; k < cols; ++k) total += p[k] * p[k];
}

// Of a whole contiguous row.
template <class T>
double row_square(const Weight<T>& w, int64_t n) {
  alignas(64) T room[kSquarePiece];
  double total = 0;
  for (int64_t k = 0; k < w.K; k += kSquarePiece) {
    const Weight<T> here = decoded(w, n, 1, k, kSquarePiece, room);
    add_squares(here.data + n * here.row_stride + k, min64(kSquarePiece, w.K - k), total);
  }
  return total;
}

template <class Acc, class T>
void row_norms_task(const RowNormsArgs& args, int64_t task, void* workspace) {
  const Weight<T> w = make_weight<T>(args.weight, args.N, args.K);
  const int64_t n0 = task * kNormRows, rows = min64(kNormRows, args.N - n0), rank = args.rank;
  if (rank == 0 && (w.col_stride == 1 || w.packed)) {
    for (int64_t n = n0; n < n0 + rows; ++n) args.out[n] = float(row_square(w, n));
    return;
  }
  Arena arena = {static_cast<char*>(workspace)};
  Acc* A = arena.take<Acc>(rank * kNormCols);
  Acc* B = arena.take<Acc>(kNormRows * rank);
  Acc* packed = arena.take<Acc>(kRows * kNormCols);
  alignas(64) T room[kRows * kNormCols];
  double total[kNormRows] = {};
  memset(B, 0, size_t(kNormRows * rank) * sizeof(Acc));
  if (rank)
    pack(args.lora_B, args.B_dtype, n0 * args.B_row_stride, args.B_row_stride, args.B_rank_stride, rows, rank, rank, B);
  for (int64_t i = 0; i < rows * rank; ++i) B[i] = Acc(args.scaling * B[i]);
  for (int64_t k0 = 0; k0 < args.K; k0 += kNormCols) {
    const int64_t cols = min64(kNormCols, args.K - k0);
    for (int64_t k = 0; rank && k < kNormCols; k += kNormStrip)
      pack(args.lora_A, args.A_dtype, (k0 + k) * args.A_col_stride, args.A_rank_stride, args.A_col_stride, rank,
           max64(0, min64(kNormStrip, cols - k)), kNormStrip, A + k * rank);
    for (int64_t n = 0; n < rows; n += kRows) {
      const Weight<T> here = decoded(w, n0 + n, kRows, k0, kNormCols, room);
      const T* tile = here.data + (n0 + n) * here.row_stride + k0 * here.col_stride;
      if (here.col_stride == 1 && n + kRows <= rows && cols == kNormCols) {
        add_squares<false>(tile, here.row_stride, A, B + n * rank, rank, cols, total + n);
      } else {
        memset(packed, 0, size_t(kRows * kNormCols) * sizeof(Acc));
        pack(tile, here.row_stride, here.col_stride, min64(kRows, rows - n), cols, kNormCols, packed);
        if (cols == kNormCols) {
          add_squares<false>(packed, kNormCols, A, B + n * rank, rank, cols, total + n);
        } else {
          add_squares<true>(packed, kNormCols, A, B + n * rank, rank, cols, total + n);
        }
      }
    }
  }
  for (int64_t n = 0; n < rows; ++n) args.out[n0 + n] = float(total[n]);
}

void row_norms(const RowNormsArgs& args, int64_t task, void* workspace) {
  switch (DType(args.dtype)) {
    case DType::kFloat32: return row_norms_task<float, float>(args, task, workspace);
    case DType::kFloat64: return row_norms_task<double, double>(args, task, workspace);
    case DType::kBFloat16: return row_norms_task<float, bfloat16>(args, task, workspace);
    default: return row_norms_task<float, float16>(args, task, workspace);
  }
}

// A task's part of the weight: some rows may be all there are, as in a slice.
constexpr int64_t kPerturbRows = kRegionShort, kPerturbCols = 4 * kRegionLong;

int64_t perturb_tasks(const PerturbArgs& args) {
  return ceil_div(args.N, kPerturbRows) * ceil_div(args.K, kPerturbCols);
}

// Stores kWidth lanes of the output along whichever of its strides is 1.
template <class T>
SIMD void store_lanes(T* p, int64_t stride, F x, int n) {
  if (stride == 1 && n == W) return store(p, x);
  if (stride == 1) return store(p, x, n);
  T lanes[W];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i * stride] = lanes[i];
}

// A row of a region: out = w + eps.
template <bool kSigns, class T>
SIMD void perturb_row(const T* w, float factor, const uint8_t* drawn, int64_t cols, T* out) {
  const auto eps = [=](int64_t k) {
    if (kSigns) return flip_signs(factor, drawn + (k >> 3));
    return mul(splat(F(), factor), load(reinterpret_cast<const int8_t*>(drawn + k)));
  };
  int64_t k = 0;
  for (; k + W <= cols; k += W) store(out + k, add(w ? load(w + k) : splat(F(), 0.0f), eps(k)));
  if (k < cols) store(out + k, add(w ? load(w + k, int(cols - k)) : splat(F(), 0.0f), eps(k)), int(cols - k));
}

// Rows [n0, n1) and columns [k0, k1), where columns lie side by side, of every kind but gaussian, which comes in tiles.
// Regions are long, and no unit is cut but by the weight's own edges. Even so a region's rows are too short for the
// hardware's prefetcher: the row that comes next but one is asked for.
template <bool kSigns, class T>
void perturb_region_rows(const Weight<T>& w, const Draw& d, int64_t n0, int64_t n1, int64_t k0, int64_t k1, T* out,
                         int64_t out_stride) {
  constexpr int64_t kCols = kRegionArea / kUnitRows, kLine = 64 / int64_t(sizeof(T));
  Region region;
  alignas(64) T room[kCols];
  for (int64_t n = n0, next; n < n1; n = next) {
    next = min64(n1, n + kUnitRows - (d.row_offset + n) % 16);
    for (int64_t k = k0; k < k1; k += kCols) {
      const int64_t cols = min64(kCols, k1 - k);
      draw_region(d, n, next - n, k, cols, region);
      for (int64_t m = n; m < next; ++m) {
        const Weight<T> here = decoded(w, m, 1, k, kCols, room);
        const T* base = here.data ? here.data + m * here.row_stride + k : nullptr;
        T* to = out + m * out_stride + k;
        for (int64_t c = 0; c < cols; c += kLine) {
          if (w.data) __builtin_prefetch(base + 2 * w.row_stride + c, 0, 2);
          __builtin_prefetch(to + 2 * out_stride + c, 1, 2);
        }
        perturb_row<kSigns>(base, d.factor(m), region.at(d, m, k), cols, to);
      }
    }
  }
}

template <class T, bool kLanesN>
void perturb_rows(const PerturbArgs& args, int64_t task) {
  const Weight<T> w = make_weight<T>(args.weight, args.N, args.K);
  const Draw draw = make_draw(args.noise, 0, args.dtype);
  const int64_t tasks_k = ceil_div(args.K, kPerturbCols), begin = task % tasks_k * kPerturbCols;
  const int64_t n0 = task / tasks_k * kPerturbRows, rows = min64(kPerturbRows, args.N - n0);
  T* out = static_cast<T*>(args.out);
  const int64_t rs = args.out_row_stride, cs = args.out_col_stride;
  const int64_t end = min64(args.K, begin + kPerturbCols);
  if (draw.kind == Noise::kNone && cs == 1 && w.packed)
    return decode(*w.packed, n0, begin, rows, end - begin, out + n0 * rs + begin, rs);
  if (draw.kind > Noise::kGaussian && cs == 1 && (w.data == nullptr || w.col_stride == 1)) {
    if (draw.kind == Noise::kNearGaussian)
      return perturb_region_rows<false>(w, draw, n0, n0 + rows, begin, end, out, rs);
    return perturb_region_rows<true>(w, draw, n0, n0 + rows, begin, end, out, rs);
  }
  Region region;
  RowLanes lanes;
  alignas(64) T room[W * kRegionLong];
  for (int64_t k0 = begin; k0 < end; k0 += kRegionLong) {
    const int64_t cols = min64(kRegionLong, end - k0);
    draw_region(draw, n0, rows, k0, cols, region);
    for (int64_t n = 0; n < rows; n += W) {
      make_row_lanes(draw, n0 + n, rows - n, region, lanes);
      const bool lanes_n = draw.kind == Noise::kGaussian;  // lanes of the weight are better along n
      const Weight<T> here = lanes_n ? decoded_columns(w, n0 + n, min64(W, rows - n), k0, cols, room)
                                     : decoded(w, n0 + n, min64(W, rows - n), k0, cols, room);
      const int64_t tile_rows = min64(W, rows - n);
      for (int64_t k = 0; k < cols; k += W) {
        prefetch_tile(w, n0 + n, k0 + k + 8 * W);
        for (int i = 0; i < tile_rows; ++i) __builtin_prefetch(out + (n0 + n + i) * rs + (k0 + k + 4 * W) * cs, 1, 2);
        F r[W];
        perturbed_tile<kLanesN>(here, draw, lanes, region, n0 + n, k0 + k, r);
        const int64_t tile_cols = min64(W, cols - k);
        T* p = out + (n0 + n) * rs + (k0 + k) * cs;
        if (tile_rows == W && tile_cols == W && (kLanesN || cs == 1)) {
          for (int i = 0; i < W; ++i) store(p + i * (kLanesN ? cs : rs), r[i]);
          continue;
        }
        for (int i = 0; i < (kLanesN ? tile_cols : tile_rows); ++i)
          store_lanes(p + i * (kLanesN ? cs : rs), kLanesN ? rs : cs, r[i], int(kLanesN ? tile_rows : tile_cols));
      }
    }
  }
}

void perturb_rows_float64(const PerturbArgs& args, int64_t task) {
  const Weight<float> zero = {nullptr, 0, 0, args.N, args.K};
  const Weight<double> w = make_weight<double>(args.weight, args.N, args.K);
  const Draw draw = make_draw(args.noise, 0, args.dtype);
  const int64_t tasks_k = ceil_div(args.K, kPerturbCols), begin = task % tasks_k * kPerturbCols;
  const int64_t n0 = task / tasks_k * kPerturbRows, rows = min64(kPerturbRows, args.N - n0);
  auto* out = static_cast<double*>(args.out);
  alignas(64) double room[W * kRegionLong];
  Region region;
  RowLanes lanes;
  for (int64_t k0 = begin; k0 < min64(args.K, begin + kPerturbCols); k0 += kRegionLong) {
    const int64_t cols = min64(kRegionLong, args.K - k0);
    draw_region(draw, n0, rows, k0, cols, region);
    for (int64_t n = 0; n < rows; n += W) {
      make_row_lanes(draw, n0 + n, rows - n, region, lanes);
      const Weight<double> here = decoded(w, n0 + n, min64(W, rows - n), k0, kRegionLong, room);
      for (int64_t k = 0; k < cols; k += W) {
        F r[W];
        perturbed_tile<false>(zero, draw, lanes, region, n0 + n, k0 + k, r);
        for (int64_t i = 0; i < min64(W, rows - n); ++i) {
          float eps[W];
          store(eps, r[i]);
          for (int64_t j = 0; j < min64(W, cols - k); ++j) {
            const int64_t row = n0 + n + i, col = k0 + k + j;
            const double base = here.data ? here.data[row * here.row_stride + col * here.col_stride] : 0.0;
            double* to = out + row * args.out_row_stride + col * args.out_col_stride;
            *to = draw.kind == Noise::kNone ? base : base + double(eps[j]);  // -0.0 stays one
          }
        }
      }
    }
  }
}

template <class T>
void perturb_type(const PerturbArgs& args, int64_t task) {
  if (args.out_row_stride == 1 && args.out_col_stride != 1) return perturb_rows<T, true>(args, task);
  perturb_rows<T, false>(args, task);
}

void perturb(const PerturbArgs& args, int64_t task) {
  switch (DType(args.dtype)) {
    case DType::kFloat32: return perturb_type<float>(args, task);
    case DType::kFloat64: return perturb_rows_float64(args, task);
    case DType::kBFloat16: return perturb_type<bfloat16>(args, task);
    default: return perturb_type<float16>(args, task);
  }
}

template <class T>
void transform_type(const TransformArgs& args, const TransformPlan& plan, int64_t task, void* workspace) {
  if (args.input_grad) return transform_task<T, true>(args, plan, task, workspace);
  transform_task<T, false>(args, plan, task, workspace);
}

void transform(const TransformArgs& args, const TransformPlan& plan, int64_t task, void* workspace) {
  switch (DType(args.dtype)) {
    case DType::kFloat32: return transform_type<float>(args, plan, task, workspace);
    case DType::kFloat64: return transform_type<double>(args, plan, task, workspace);
    case DType::kBFloat16: return transform_type<bfloat16>(args, plan, task, workspace);
    default: return transform_type<float16>(args, plan, task, workspace);
  }
}

#define NAME_OF(x) #x
#define NAME(x) NAME_OF(x)
extern const Kernels kKernels;
const Kernels kKernels = {NAME(FLATLORA_ISA), plan_linear,   linear,  row_norms_tasks, row_norms_workspace,
                          row_norms,          perturb_tasks, perturb, plan_transform,  transform};

}  // namespace FLATLORA_ISA
}  // namespace flatlora
