// Kernels that break one rule each, and twins that keep it: tests/csrc/test_emulator_checks.py runs them in the
// emulator.
#include <cstring>

#include "../../csrc/cuda/launch.h"

namespace flatlora {
namespace {

using namespace gpu;

using Out = float*;
using In = const float*;

// --- Order ---

void store_then_load(Out out, In, bool synchronise) {
  const Shared p = shared_base() + 4 * thread();
  store_shared(p, float(thread()));
  if (synchronise) sync_threads();
  store_global(out + thread(), load_shared<float>(p ^ 128));  // of the neighbouring warp
}
void synchronised(Out out, In in) { store_then_load(out, in, true); }
void no_barrier(Out out, In in) { store_then_load(out, in, false); }

void overwritten_too_early(Out out, In) {
  store_shared(shared_base() + 4 * thread(), 1.0f);
  sync_threads();
  store_global(out + thread(), load_shared<float>(shared_base() + 4 * (thread() ^ 32)));
  store_shared(shared_base() + 4 * thread(), 2.0f);
}

enum class Warp { kNothing, kShuffle, kSync };
template <Warp between>
void lanes(Out out, In) {
  store_shared(shared_base() + 4 * thread(), 1.0f);
  if (between == Warp::kShuffle) shuffle_xor(1.0f, 1);
  if (between == Warp::kSync) sync_warp();
  store_global(out + thread(), load_shared<float>(shared_base() + 4 * (thread() ^ 1)));
}

void halves_of_a_word(Out out, In) {
  store_shared(shared_base() + 2 * thread(), uint16_t(thread()));
  sync_threads();
  store_global(out + thread(), float(load_shared<uint16_t>(shared_base() + 2 * (thread() ^ 1))));
}
void same_half(Out, In) { store_shared(shared_base() + 2 * (thread() / 2), uint16_t(1)); }

void named(Out out, In) {
  if (warp() == 0) {
    store_shared(shared_base() + 4 * lane(), 1.0f);
    sync_named(1, 64);
  } else {
    sync_named(1, 64);
    store_global(out + lane(), load_shared<float>(shared_base() + 4 * lane()));
  }
}
void wrong_named_barrier(Out out, In) {
  store_shared(shared_base() + 4 * thread(), 1.0f);
  sync_named(1 + warp(), 32);
  store_global(out + thread(), load_shared<float>(shared_base() + 4 * (thread() ^ 32)));
}

// --- Copies ---

enum Steps { kCommit = 1, kWait = 2, kBarrier = 4, kAll = 7 };
template <int steps, int read_of>
void copies(Out out, In in) {
  cp_async<4>(shared_base() + 4 * thread(), in + thread());
  if (steps & kCommit) cp_async_commit();
  if (steps & kWait) cp_async_wait<0>();
  if (steps & kBarrier) sync_threads();
  store_global(out + thread(), load_shared<float>(shared_base() + 4 * (thread() ^ read_of)));
}
void one_copy_too_few(Out out, In in) {
  cp_async<4>(shared_base() + 4 * thread(), in);
  cp_async_commit();
  cp_async<4>(shared_base() + 4 * thread() + 1024, in);
  cp_async_commit();
  cp_async_wait<1>();
  store_global(out + thread(), load_shared<float>(shared_base() + 4 * thread() + 1024));
}
void copy_over_unread(Out out, In in) {
  store_shared(shared_base() + 4 * thread(), 1.0f);
  sync_threads();
  const float x = load_shared<float>(shared_base() + 4 * (thread() ^ 32));
  cp_async<4>(shared_base() + 4 * thread(), in);
  store_global(out + thread(), x);
}
void copy_tail(Out out, In in) {
  cp_async<16>(shared_base() + 16 * thread(), in + 4 * thread(), thread() == 0 ? 6 : 0);
  cp_async_commit();
  cp_async_wait<0>();
  const Words<4> w = load_shared<Words<4>>(shared_base() + 16 * thread());
  store_global(out + thread(), scalar::as_float(w.v[1]));
}
void copy_under_way(Out out, In in) {
  store_shared(shared_base() + 4 * thread(), 1.0f);
  cp_async<4>(shared_base() + 4 * thread(), in + thread());
  cp_async_commit();
  store_global(out + thread(), load_shared<float>(shared_base() + 4 * thread()));
  cp_async_wait<0>();
}
void copy_of_too_much(Out, In in) { cp_async<16>(shared_base() + 16 * thread(), in, 20); }
void misaligned_copy_from(Out, In in) { cp_async<16>(shared_base() + 16 * thread(), in + 1); }
void misaligned_copy_to(Out, In in) { cp_async<16>(shared_base() + 8, in); }

// --- Bounds and alignment ---

void never_written(Out out, In) { store_global(out + thread(), load_shared<float>(shared_base() + 4 * thread())); }
void beyond_shared(Out, In) { store_shared(shared_base() + 8192 + 4 * thread(), 1.0f); }
void before_shared(Out, In) { load_shared<float>(shared_base() - 4); }
void misaligned_shared(Out, In) { load_shared<Words<4>>(shared_base() + 16 * thread() + 8); }
void misaligned_global(Out, In in) { load_global<Words<4>>(in + 2); }
void beyond_global(Out, In in) { load_global<float>(in + 4096); }
void beyond_global_copy(Out, In in) { cp_async<16>(shared_base() + 16 * thread(), in + 4096); }
void read_only(Out, In in) { store_global(const_cast<float*>(in), 1.0f); }
void two_blocks_write(Out out, In) { store_global(out + thread(), 1.0f); }
void reads_what_others_write(Out out, In) {
  if (warp()) return;
  store_global(out + block() * 32 + lane(), 1.0f);
  load_global<float>(out + (1 - block()) * 32 + lane());
}

// --- Meeting ---

void ended_before_barrier(Out, In) {
  if (thread() >= 32) sync_threads();
}
void two_barriers(Out, In) {
  if (warp() == 0)
    sync_threads();
  else
    sync_threads();
}
void half_a_warp(Out, In) {
  if (lane() < 16) sync_warp();
}
void diverged(Out, In) {
  if (lane() < 16)
    shuffle_xor(1.0f, 1);
  else
    sync_warp();
}
void not_uniform(Out, In) { uniform(lane()); }
void too_few_for_barrier(Out, In) {
  if (warp() == 0) sync_named(2, 64);
}
void counts_of_barrier(Out, In) { sync_named(1, warp() == 0 ? 64 : 32); }
void barrier_of_odd_size(Out, In) { sync_named(1, 33); }

// --- Banks: the conflicts per phase are in the name ---

template <int stride, class V>
void banks(Out, In) {
  store_shared(shared_base() + stride * lane(), V());
}
template <int row_bytes, bool swizzled>
void banks_of_matrix(Out, In) {
  uint32_t r[4];
  const int chunk = swizzled ? lane() % 8 : 0;
  ldmatrix(r, shared_base() + row_bytes * lane() + 16 * chunk);
}

const struct Case {
  const char* name;
  void (*kernel)(Out, In);
  int blocks = 1;
} cases[] = {
    {"synchronised", synchronised},
    {"no_barrier", no_barrier},
    {"overwritten_too_early", overwritten_too_early},
    {"lanes", lanes<Warp::kNothing>},
    {"lanes_after_shuffle", lanes<Warp::kShuffle>},
    {"lanes_after_sync", lanes<Warp::kSync>},
    {"halves_of_a_word", halves_of_a_word},
    {"same_half", same_half},
    {"named", named},
    {"wrong_named_barrier", wrong_named_barrier},
    {"copies", copies<kAll, 32>},
    {"own_copies_without_barrier", copies<kCommit | kWait, 0>},
    {"copies_without_commit", copies<kWait | kBarrier, 0>},
    {"copies_without_wait", copies<kCommit | kBarrier, 0>},
    {"copies_without_barrier", copies<kCommit | kWait, 32>},
    {"copies_without_barrier_in_warp", copies<kCommit | kWait, 1>},
    {"one_copy_too_few", one_copy_too_few},
    {"copy_over_unread", copy_over_unread},
    {"copy_tail", copy_tail},
    {"copy_under_way", copy_under_way},
    {"copy_of_too_much", copy_of_too_much},
    {"misaligned_copy_from", misaligned_copy_from},
    {"misaligned_copy_to", misaligned_copy_to},
    {"never_written", never_written},
    {"beyond_shared", beyond_shared},
    {"before_shared", before_shared},
    {"misaligned_shared", misaligned_shared},
    {"misaligned_global", misaligned_global},
    {"beyond_global", beyond_global},
    {"beyond_global_copy", beyond_global_copy},
    {"read_only", read_only},
    {"one_block_writes", two_blocks_write},
    {"two_blocks_write", two_blocks_write, 2},
    {"reads_what_others_write", reads_what_others_write, 2},
    {"ended_before_barrier", ended_before_barrier},
    {"two_barriers", two_barriers},
    {"half_a_warp", half_a_warp},
    {"diverged", diverged},
    {"not_uniform", not_uniform},
    {"too_few_for_barrier", too_few_for_barrier},
    {"counts_of_barrier", counts_of_barrier},
    {"barrier_of_odd_size", barrier_of_odd_size},
    {"banks_4_0", banks<4, float>},
    {"banks_8_1", banks<8, float>},
    {"banks_128_31", banks<128, float>},
    {"banks_2_0", banks<2, uint16_t>},
    {"banks_16_0", banks<16, Words<4>>},
    {"banks_32_1", banks<32, Words<4>>},
    {"banks_matrix_16_0", banks_of_matrix<16, false>},
    {"banks_matrix_64_3", banks_of_matrix<64, false>},
    {"banks_matrix_128_7", banks_of_matrix<128, false>},
    {"banks_matrix_128_0", banks_of_matrix<128, true>},
};

}  // namespace
}  // namespace flatlora

#define EXPORT extern "C" __attribute__((visibility("default")))

// The error of the launch; -1 for an unknown name. `in` has 4096 floats, `out` 64.
EXPORT int run_case(const char* name, float* out, const float* in) {
  namespace gpu = flatlora::gpu;
  for (const auto& c : flatlora::cases) {
    if (strcmp(c.name, name)) continue;
    gpu::allow_memory(in, 4096 * 4, false);
    gpu::allow_memory(out, 64 * 4, true);
    const gpu::Error error = gpu::launch(c.kernel, gpu::Launch{c.blocks, 64, 8192, nullptr}, out, in);
    gpu::forget_memory();
    return error;
  }
  return -1;
}
EXPORT const char* case_names() {
  static std::string all;
  if (all.empty())
    for (const auto& c : flatlora::cases) all += std::string(c.name) + " ";
  return all.c_str();
}
