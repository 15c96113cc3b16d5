// Waves, the ring, tensor maps, and the launch.
#include "linear_sm90_ahead.h"

namespace flatlora {

template <>
gpu::Error launch_linear_ahead<gpu::bf16>(int, const gpu::Launch&, const AheadMaps&, const AheadJob&);
template <>
gpu::Error launch_linear_ahead<gpu::f16>(int, const gpu::Launch&, const AheadMaps&, const AheadJob&);

namespace {

constexpr int64_t kMost = int64_t(1) << 31;  // coordinates of the copy engine
constexpr int64_t kLeastDepth = 8;           // steps; more than a block has stages, or it would wait for itself

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

struct Plan {
  AheadJob job;
  int config;
  int64_t ring_bytes, counter_bytes;
};

// False where the workspace has no room for a ring.
bool plan_tile(const LinearArgs& args, const Gpu& gpu, int config, int64_t workspace, Plan* result) {
  const AheadTile& tile = kAheadTiles[config];
  Plan plan = {};
  plan.config = config;
  AheadJob& job = plan.job;
  job.args = args;
  job.outputs = args.input_grad ? args.K : args.N;
  job.length = args.input_grad ? args.N : args.K;
  job.row_bytes = 2 * args.weight.row_stride;
  job.rows_per_sample = args.M / args.noise.samples;
  const int64_t tiles_m = ceil_div(job.rows_per_sample, AheadTile::m), tiles_n = ceil_div(job.outputs, tile.n);
  const int64_t columns = tiles_n * args.noise.samples, tiles = columns * tiles_m;
  const int64_t lora_steps = ceil_div(args.rank, AheadTile::k), steps = lora_steps + ceil_div(job.length, AheadTile::k);
  const int64_t waves = ceil_div(tiles, gpu.processors);
  if ((waves + 1) * gpu.processors * steps >= kMost || columns * tiles_n >= kMost) return false;
  // Whole columns where that costs no wave: what two waves share is drawn twice.
  int64_t workers = ceil_div(tiles, waves);
  if (round_up(workers, tiles_m) <= gpu.processors) workers = round_up(workers, tiles_m);
  const int64_t most = workers % tiles_m == 0 ? workers / tiles_m : (workers + tiles_m - 2) / tiles_m + 1;
  const int64_t wide = smaller(most, columns), all = waves * steps;
  const int64_t of_step = wide * tile.w_bytes() + 4 * (wide + 1);
  const int64_t depth = smaller((workspace - 16) / of_step, all);
  if (depth < smaller(kLeastDepth, all) || depth * wide * tile.n >= kMost) return false;
  job.tiles_m = int(tiles_m);
  job.tiles_n = int(tiles_n);
  job.columns = int(columns);
  job.tiles = int(tiles);
  job.lora_steps = int(lora_steps);
  job.steps = int(steps);
  job.workers = int(workers);
  job.waves = int(waves);
  job.idle = int(waves * workers - tiles);
  job.wide = int(wide);
  job.depth = int(depth);
  job.per_tiles_n = tiles_n == 1 ? 0 : uint32_t(ceil_div(int64_t(1) << 32, tiles_n));
  const int64_t stride = AheadTile::kDrawers * gpu.processors;
  const int64_t units = wide * (tile.n / unit_lines(static_cast<Noise>(args.noise.kind)));
  job.stride_steps = int(stride / units);
  job.stride_units = int(stride % units);
  plan.ring_bytes = depth * wide * tile.w_bytes();
  plan.counter_bytes = 4 * (depth * (wide + 1) + 1);
  *result = plan;
  return true;
}

// The wide tile, but where too few blocks would have one.
bool plan_of(const LinearArgs& args, const Gpu& gpu, int64_t workspace, Plan* plan) {
  if (gpu.config >= 0 && gpu.config < kAheadConfigs) return plan_tile(args, gpu, int(gpu.config), workspace, plan);
  const bool large = plan_tile(args, gpu, kAheadLarge, workspace, plan);
  Plan small;
  if (large && plan->job.tiles >= gpu.processors * 3 / 4) return true;
  if (!plan_tile(args, gpu, kAheadSmall, workspace, &small)) return large;
  *plan = small;
  return true;
}

// Signs come by 16 rows of the whole weight.
bool whole_calls(const NoiseArgs& noise) {
  return static_cast<Noise>(noise.kind) != Noise::kRademacher || noise.row_offset % 16 == 0;
}

bool plain_bias(const LinearArgs& args) {
  return args.bias == nullptr ||
         (args.bias_dtype == args.dtype && args.bias_stride == 1 && reinterpret_cast<uintptr_t>(args.bias) % 4 == 0);
}

bool plain_factor(const LinearArgs& args) {
  return args.lora_A == nullptr || (!args.input_grad && aligned(args.lora_A) && args.lora_A_stride % 8 == 0);
}

}  // namespace

bool linear_ahead_takes(const LinearArgs& args, const Gpu& gpu) {
  const int64_t length = args.input_grad ? args.N : args.K, outputs = args.input_grad ? args.K : args.N;
  const int64_t a_stride = args.M > 1 ? args.a_row_stride : length;
  Plan plan;
  return args.weight.packed == nullptr && args.dtype != int64_t(DType::kFloat32) && !args.split_noise &&
         args.M < kMost && args.N < kMost && args.K < kMost && args.a_col_stride == 1 && aligned(args.a) &&
         a_stride % 8 == 0 && a_stride >= length && args.weight.col_stride == 1 && aligned(args.weight.data) &&
         args.weight.row_stride % 8 == 0 && args.weight.row_stride >= 0 && args.K % 8 == 0 && outputs % 8 == 0 &&
         aligned(args.y) && plain_bias(args) && args.noise.scale_stride == 1 &&
         (args.rank == 0 || (args.rank % 8 == 0 && aligned(args.u))) && plain_factor(args) &&
         begins_whole(args.noise) && whole_calls(args.noise) && plan_of(args, gpu, args.workspace_limit, &plan);
}

int64_t linear_ahead_workspace(const LinearArgs& args, const Gpu& gpu) {
  Plan plan;
  return plan_of(args, gpu, args.workspace_limit, &plan) ? plan.ring_bytes + plan.counter_bytes : 0;
}

gpu::Error linear_ahead(const LinearArgs& args, const Gpu& gpu) {
  Plan plan;
  plan_of(args, gpu, args.workspace_limit, &plan);
  const AheadTile& tile = kAheadTiles[plan.config];
  AheadJob& job = plan.job;
  job.ring = static_cast<char*>(gpu.workspace);
  job.drawn = reinterpret_cast<uint32_t*>(job.ring + plan.ring_bytes);
  job.read = job.drawn + job.depth * job.wide;
  job.made = job.read + job.depth;
  if (const gpu::Error e = gpu::clear(job.drawn, plan.counter_bytes, gpu.stream)) return e;

  const bool is_bf16 = args.dtype == int64_t(DType::kBFloat16);
  const int64_t a_stride = args.M > 1 ? args.a_row_stride : job.length, lines = int64_t(job.depth) * job.wide * tile.n;
  AheadMaps maps;
  if (const gpu::Error e =
          gpu::encode_tensor_map(&maps.a, args.a, args.M, job.length, 2 * a_stride, AheadTile::m, is_bf16))
    return e;
  maps.u = maps.a;
  if (args.rank > 0) {
    const gpu::Error e =
        gpu::encode_tensor_map(&maps.u, args.u, args.M, args.rank, 2 * args.rank, AheadTile::m, is_bf16);
    if (e) return e;
  }
  if (const gpu::Error e = gpu::encode_tensor_map(&maps.w, job.ring, lines, AheadTile::k, 128, tile.n, is_bf16))
    return e;
  if (const gpu::Error e = gpu::encode_tensor_maps(&maps.y, args.y, int(args.noise.samples), job.rows_per_sample,
                                                   job.outputs, 2 * job.outputs, AheadTile::kOutLines, is_bf16))
    return e;
  gpu::Launch how = {gpu.processors, AheadTile::kThreads, tile.shared_bytes(), gpu.stream};
  how.together = true;
  const auto run = is_bf16 ? launch_linear_ahead<gpu::bf16> : launch_linear_ahead<gpu::f16>;
  return run(plan.config, how, maps, job);
}

}  // namespace flatlora
