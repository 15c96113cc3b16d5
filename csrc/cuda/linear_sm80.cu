// The choice of a tile and of parts, and the launches.
#include "linear_sm80.h"
#include "split.h"

namespace flatlora {

template <>
gpu::Error launch_linear_sm80<gpu::bf16>(Config, const gpu::Launch&, const LinearJob&);
template <>
gpu::Error launch_linear_sm80<gpu::f16>(Config, const gpu::Launch&, const LinearJob&);
template <>
gpu::Error launch_linear_sm80<float>(Config, const gpu::Launch&, const LinearJob&);
gpu::Error launch_linear_packed_sm80(Config, const gpu::Launch&, const PackedLinearJob&);

namespace {

struct Plan {
  PackedLinearJob job;
  Config config;
  gpu::Launch how;
};

// Rows can be copied in 16 bytes, and those of a tile lie at offsets below 2^32 bytes.
bool can_copy(const void* data, int64_t rows, int64_t row_stride, int64_t col_stride, int64_t element) {
  if (rows == 1) row_stride = 0;
  return col_stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride * element % 16 == 0 &&
         row_stride >= 0 && row_stride * element < (int64_t(1) << 32) / 256;
}

Plan plan_of(const LinearArgs& args, const Gpu& gpu, int64_t workspace) {
  Plan plan = {};
  PackedLinearJob& job = plan.job;
  const PackedArgs* const packed = args.weight.packed;
  const int element = args.dtype == int64_t(DType::kFloat32) ? 4 : 2;
  job.args = args;
  job.outputs = args.input_grad ? args.K : args.N;
  job.length = args.input_grad ? args.N : args.K;
  job.rows_per_sample = args.M / args.noise.samples;
  const bool apart = args.split_noise && element == 2, small = apart || element == 4;
  job.tf32 = gpu.tf32 && !args.split_noise;  // W + eps in full float32 keeps the noise
  job.any = !begins_whole(args.noise);
  const bool w_copies =
      packed == nullptr ? can_copy(args.weight.data, args.N, args.weight.row_stride, args.weight.col_stride, element)
                        : packed_rows(*packed, args.N, args.K, args.dtype, &job.packed) &&
                              (job.packed.scales << job.packed.scale_shift) % 4 == 0;  // whole words
  job.copies = can_copy(args.a, args.M, args.a_row_stride, args.a_col_stride, element) && w_copies &&
               args.noise.scale_stride == 1 && !job.any;
  const int64_t part_bytes = args.M * job.outputs * 4;
  const Extent extent = {args.noise.samples, job.rows_per_sample, job.outputs, job.length, workspace / part_bytes};
  Choice choice = choose(element, extent, job.copies, small, gpu.processors, gpu.shared_limit);
  if (packed != nullptr && choice.config == kFewRows) choice = choose_parts(kAny, extent, gpu.processors);
  if (gpu.config >= 0 && gpu.config < kConfigs && job.copies && (!small || gpu.config >= kAny) &&
      (packed == nullptr || gpu.config != kFewRows))
    choice = choose_parts(static_cast<Config>(gpu.config), extent, gpu.processors);
  plan.config = choice.config;
  const Tile& tile = kTiles[plan.config];

  job.tiles_per_sample = ceil_div(job.rows_per_sample, tile.m);
  job.tiles_m = job.tiles_per_sample * args.noise.samples;
  job.tiles_n = ceil_div(job.outputs, tile.n);
  const int64_t steps = extent.steps(tile), tiles = extent.tiles(tile);
  const int64_t parts = gpu.splits < 1 ? choice.parts : gpu.splits;
  job.steps_per_part = ceil_div(steps, parts < steps ? parts : steps);
  job.parts = ceil_div(steps, job.steps_per_part);

  plan.how.blocks = tiles * job.parts;
  plan.how.threads = tile.threads();
  plan.how.shared_bytes =
      tile.shared_bytes(element) + (apart ? tile.rest_bytes(element) : 0) + (packed == nullptr ? 0 : kPackedTable);
  plan.how.stream = gpu.stream;
  plan.how.cluster = 1;
  return plan;
}

}  // namespace

bool linear_sm80_takes(const LinearArgs& args) {
  const PackedArgs* const packed = args.weight.packed;
  PackedRows rows;
  return packed == nullptr ||
         (args.dtype == int64_t(DType::kBFloat16) && packed_rows(*packed, args.N, args.K, args.dtype, &rows) &&
          rows.scale_shift != 1 && !rows.rounds && rows.row_bytes < (int64_t(1) << 32) / 256);
}

int64_t linear_sm80_workspace(const LinearArgs& args, const Gpu& gpu) {
  const LinearJob job = plan_of(args, gpu, args.workspace_limit).job;
  return job.parts == 1 ? 0 : job.parts * args.M * job.outputs * 4;
}

gpu::Error linear_sm80(const LinearArgs& args, const Gpu& gpu) {
  Plan plan = plan_of(args, gpu, gpu.workspace_bytes);
  plan.job.partial = static_cast<float*>(gpu.workspace);
  const bool is_bf16 = args.dtype == int64_t(DType::kBFloat16), is_f16 = args.dtype == int64_t(DType::kFloat16);
  const auto run = is_bf16  ? launch_linear_sm80<gpu::bf16>
                   : is_f16 ? launch_linear_sm80<gpu::f16>
                            : launch_linear_sm80<float>;
  const gpu::Error error = args.weight.packed == nullptr ? run(plan.config, plan.how, plan.job)
                                                         : launch_linear_packed_sm80(plan.config, plan.how, plan.job);
  return error || plan.job.parts == 1 ? error : add_parts(plan.job, gpu);
}

}  // namespace flatlora
