// The choice of a tile and of parts, tensor maps, and the launches.
#include "linear_sm90.h"

namespace flatlora {

template <>
gpu::Error launch_linear_sm90<gpu::bf16>(int, const gpu::Launch&, const gpu::TensorMap&, const gpu::TensorMap&,
                                         const Sm90Job&);
template <>
gpu::Error launch_linear_sm90<gpu::f16>(int, const gpu::Launch&, const gpu::TensorMap&, const gpu::TensorMap&,
                                        const Sm90Job&);

namespace {

struct Plan {
  Sm90Job job;
  int config;
  gpu::Launch how;
  double cycles;
};

// With this tile, and with `parts` parts of the contraction (0 = what takes least time).
gpu::Error plan_tile(const LinearArgs& args, const Gpu& gpu, int config, int64_t parts, int64_t workspace,
                     Plan* result) {
  const Sm90Tile& tile = kSm90Tiles[config];
  Plan plan = {};
  plan.config = config;
  plan.how.blocks = plan.how.cluster = tile.cluster;
  plan.how.threads = tile.threads();
  plan.how.shared_bytes = tile.shared_bytes();
  plan.how.stream = gpu.stream;
  int64_t clusters = 0;
  if (const gpu::Error e = clusters_sm90(config, plan.how, gpu.processors, &clusters)) return e;
  if (clusters < 1) clusters = 1;
  LinearJob& job = plan.job.linear;
  job.args = args;
  job.outputs = args.input_grad ? args.K : args.N;
  job.length = args.input_grad ? args.N : args.K;
  job.row_bytes = 2 * args.weight.row_stride;
  job.unit_bytes = 8 * job.row_bytes;
  job.turn_bytes = job.row_bytes * tile.k * tile.producers;
  job.rows_per_sample = args.M / args.noise.samples;
  job.tiles_per_sample = ceil_div(job.rows_per_sample, tile.m * tile.cluster) * tile.cluster;
  job.tiles_m = job.tiles_per_sample * args.noise.samples;
  job.tiles_n = ceil_div(job.outputs, tile.n);
  const int64_t steps = ceil_div(job.length, tile.k);
  const int64_t tiles = job.tiles_m / tile.cluster * job.tiles_n;
  const auto time = [&](int64_t parts) {
    // Four more steps for the beginning and end of a tile. A value of a part costs as much as 16 bytes of memory
    // traffic, of which a processor has its share of 25 bytes in a cycle.
    const double sum = parts > 1 ? double(parts * args.M * job.outputs) * 16 / 25 / double(gpu.processors) : 0;
    return double(ceil_div(tiles * parts, clusters)) * double(ceil_div(steps, parts) + 4) * tile.cycles + sum;
  };
  if (parts < 1) {
    parts = 1;
    const int64_t part_bytes = args.M * job.outputs * 4;
    for (int64_t more = 2; more * part_bytes <= workspace && more <= steps / 8; ++more)
      if (time(more) < time(parts)) parts = more;
  }
  plan.cycles = time(parts);
  job.steps_per_part = ceil_div(steps, parts < steps ? parts : steps);
  job.parts = ceil_div(steps, job.steps_per_part);
  plan.job.cluster_tiles = tiles * job.parts;
  plan.how.blocks *= plan.job.cluster_tiles < clusters ? plan.job.cluster_tiles : clusters;
  *result = plan;
  return 0;
}

gpu::Error plan_of(const LinearArgs& args, const Gpu& gpu, int64_t workspace, Plan* best) {
  if (gpu.config >= 0 && gpu.config < kSm90Configs)
    return plan_tile(args, gpu, int(gpu.config), gpu.splits, workspace, best);
  for (int config = 0; config < kSm90Configs; ++config) {
    Plan plan;
    if (const gpu::Error e = plan_tile(args, gpu, config, gpu.splits, workspace, &plan)) return e;
    if (config == 0 || plan.cycles < best->cycles) *best = plan;
  }
  return 0;
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace

bool linear_sm90_takes(const LinearArgs& args, const Gpu& gpu) {
  constexpr int64_t kMost = int64_t(1) << 31;  // coordinates of the copy engine
  const int64_t length = args.input_grad ? args.N : args.K, rows = args.M / args.noise.samples;
  const int64_t a_stride = args.M > 1 ? args.a_row_stride : length;
  return args.weight.packed == nullptr && args.dtype != int64_t(DType::kFloat32) && !args.split_noise &&
         (rows > 64 || gpu.config >= 0) && args.M < kMost && length < kMost && args.a_col_stride == 1 &&
         aligned(args.a) && a_stride % 8 == 0 && a_stride >= length && args.weight.col_stride == 1 &&
         aligned(args.weight.data) && args.weight.row_stride % 8 == 0 && args.weight.row_stride >= 0 &&
         args.weight.row_stride < kMost / 128 && args.K % 8 == 0 && args.noise.scale_stride == 1 &&
         (args.rank == 0 || (args.rank % 8 == 0 && aligned(args.u))) && begins_whole(args.noise);
}

int64_t linear_sm90_workspace(const LinearArgs& args, const Gpu& gpu) {
  Plan plan;
  if (const gpu::Error e = plan_of(args, gpu, args.workspace_limit, &plan)) return -int64_t(e);
  const LinearJob& job = plan.job.linear;
  return job.parts == 1 ? 0 : job.parts * args.M * job.outputs * 4;
}

gpu::Error linear_sm90(const LinearArgs& args, const Gpu& gpu) {
  Plan plan;
  if (const gpu::Error e = plan_of(args, gpu, gpu.workspace_bytes, &plan)) return e;
  const Sm90Tile& tile = kSm90Tiles[plan.config];
  LinearJob& job = plan.job.linear;
  job.partial = static_cast<float*>(gpu.workspace);

  const bool is_bf16 = args.dtype == int64_t(DType::kBFloat16);
  const int64_t a_stride = args.M > 1 ? args.a_row_stride : job.length;
  gpu::TensorMap a_map, u_map;
  if (const gpu::Error e = gpu::encode_tensor_map(&a_map, args.a, args.M, job.length, 2 * a_stride, tile.m, is_bf16))
    return e;
  u_map = a_map;
  if (args.rank > 0) {
    const gpu::Error e = gpu::encode_tensor_map(&u_map, args.u, args.M, args.rank, 2 * args.rank, tile.m, is_bf16);
    if (e) return e;
  }
  const auto run = is_bf16 ? launch_linear_sm90<gpu::bf16> : launch_linear_sm90<gpu::f16>;
  const gpu::Error error = run(plan.config, plan.how, a_map, u_map, plan.job);
  return error || job.parts == 1 ? error : add_parts(job, gpu);
}

}  // namespace flatlora
