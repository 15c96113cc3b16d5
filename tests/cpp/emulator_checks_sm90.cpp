// Kernels for sm_90a that break one rule each, and twins that keep it: tests/csrc/test_emulator_checks_sm90.py runs
// them in the emulator.
#include <cstring>
#include <string>

#include "../../csrc/cuda/launch.h"

namespace flatlora {
namespace {

using namespace gpu;

using Out = float*;
using Map = const TensorMap*;

// Shared memory: the first 16 KiB are data, then come barriers.
Shared data(int i = 0) { return shared_base() + uint32_t(i) * 1024; }
Shared barrier(int i = 0) { return shared_base() + 16384 + uint32_t(i) * 8; }

// Barriers of so many arrivals, seen by the cluster.
void start(int arrivals, int more = 1) {
  if (thread() == 0) {
    mbarrier_init(barrier(0), arrivals);
    mbarrier_init(barrier(1), more);
    fence_mbarrier_init();
  }
  cluster_sync();
}

// --- mbarrier ---

// Warp 0 says `times` times that it has written; `parities` are what warp 1 waits for.
void arrivals(Out out, int expected, int times, std::initializer_list<uint32_t> parities) {
  start(expected);
  if (warp() == 0) {
    store_shared(data() + uint32_t(lane()) * 4, float(lane()));
    for (int i = 0; i < times; ++i) mbarrier_arrive(barrier());
  } else if (warp() == 1) {
    for (uint32_t parity : parities) mbarrier_wait(barrier(), parity);
    store_global(out + lane(), load_shared<float>(data() + uint32_t(lane()) * 4));
  }
}
void arrive(Out out, Map) { arrivals(out, 32, 1, {0}); }
void too_few_arrivals(Out out, Map) { arrivals(out, 33, 1, {0}); }
void second_phase_never_ends(Out out, Map) { arrivals(out, 32, 1, {0, 1}); }
void phase_before_the_first(Out out, Map) { arrivals(out, 32, 1, {1}); }
void missed_a_phase(Out out, Map) {
  start(32);
  if (warp() == 0)
    for (int i = 0; i < 2; ++i) mbarrier_arrive(barrier());
  sync_threads();
  if (warp() == 1) mbarrier_wait(barrier(), 0);
  if (out == nullptr) return;
}
void too_many_arrivals(Out, Map map) {
  start(1);
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(), 2048);
    mbarrier_arrive(barrier());
    tma_load(data(), map, 0, 0, barrier());
  }
}
void elected_without_sync_warp(Out out, Map) {
  start(1);
  if (warp() == 0) {
    store_shared(data() + uint32_t(lane()) * 4, float(lane()));
    if (lane() == 0) mbarrier_arrive(barrier());
  } else if (warp() == 1) {
    mbarrier_wait(barrier(), 0);
    store_global(out + lane(), load_shared<float>(data() + uint32_t(lane()) * 4));
  }
}
void two_barriers_in_one_place(Out, Map) {
  if (thread() == 0)
    for (int i = 0; i < 2; ++i) mbarrier_init(barrier(), 1);
}
void writes_over_barrier(Out, Map) {
  start(1);
  if (thread() == 1) store_shared(barrier(), 0.0f);
}
void no_barrier(Out, Map) { mbarrier_arrive(barrier()); }
void misaligned_barrier(Out, Map) {
  if (thread() == 0) mbarrier_init(barrier() + 4, 1);
}
void no_arrivals(Out, Map) { mbarrier_init(barrier(), 0); }

// --- Copies ---

void load(Map map, int bytes, Shared to = data(), int column = 0, int row = 0) {
  if (thread() != 0) return;
  mbarrier_arrive_expect(barrier(), bytes);
  tma_load(to, map, column, row, barrier());
}
void take(Out out, Shared from = data()) {
  store_global(out + thread(), float(load_shared<uint16_t>(from + uint32_t(thread()) * 2)));
}
void tma(Out out, Map map) {
  start(1);
  load(map, 2048);
  mbarrier_wait(barrier(), 0);
  take(out);
}
void tma_without_wait(Out out, Map map) {
  start(1);
  load(map, 2048);
  take(out);
  mbarrier_wait(barrier(), 0);
}
void tma_without_end(Out, Map map) {
  start(1);
  load(map, 2048);
}
void one_thread_waits(Out out, Map map) {
  start(1);
  load(map, 2048);
  if (thread() == 0) mbarrier_wait(barrier(), 0);
  take(out);
}
void one_thread_waits_for_all(Out out, Map map) {
  start(1);
  load(map, 2048);
  if (thread() == 0) mbarrier_wait(barrier(), 0);
  sync_threads();
  take(out);
}
void too_many_bytes(Out out, Map map) {
  start(1);
  load(map, 2064);
  mbarrier_wait(barrier(), 0);
  take(out);
}
void too_few_bytes(Out out, Map map) {
  start(1);
  load(map, 2032);
  mbarrier_wait(barrier(), 0);
  take(out);
}
void tma_misaligned(Out, Map map) {
  start(1);
  load(map, 2048, data() + 128);
}
void tma_beyond_shared(Out, Map map) {
  start(1);
  load(map, 2048, data(17));
}
void tma_over_barrier(Out, Map map) {
  start(1);
  load(map, 2048, data(15));
}
void tma_over_unread(Out out, Map map) {
  start(1);
  load(map, 2048);
  mbarrier_wait(barrier(), 0);
  take(out);
  load(map, 2048);
  mbarrier_wait(barrier(), 1);
}
void tma_over_stores(Out out, Map map, bool fence) {
  start(1);
  store_shared(data() + uint32_t(thread()) * 4, 1.0f);
  if (fence) fence_proxy_async();
  sync_threads();
  load(map, 2048);
  mbarrier_wait(barrier(), 0);
  take(out);
}
void tma_over_stores_fenced(Out out, Map map) { tma_over_stores(out, map, true); }
void tma_over_stores_unfenced(Out out, Map map) { tma_over_stores(out, map, false); }
void fenced_by_one(Out out, Map map) {
  start(1);
  store_shared(data() + uint32_t(thread()) * 4, 1.0f);
  sync_threads();
  if (thread() == 0) fence_proxy_async();
  load(map, 2048);
  mbarrier_wait(barrier(), 0);
  take(out);
}

// Block 0 of a cluster loads for `blocks`.
void multicast(Out out, Map map, int blocks, bool sync_at_end = true, bool wait = true) {
  start(1);
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(), 2048);
    if (cluster_rank() == 0) tma_load_multicast(data(), map, 0, 0, barrier(), uint16_t(blocks));
  }
  if (wait || cluster_rank() == 0) mbarrier_wait(barrier(), 0);
  if (cluster_rank() == 1) take(out);
  if (sync_at_end) cluster_sync();
}
void multicast_to_both(Out out, Map map) { multicast(out, map, 3); }
void multicast_to_one(Out out, Map map) { multicast(out, map, 1); }
void multicast_to_nobody(Out out, Map map) { multicast(out, map, 4); }
void multicast_without_wait(Out out, Map map) { multicast(out, map, 3, true, false); }
void multicast_over_unread(Out out, Map map) {
  multicast(out, map, 3, false);
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier(), 2048);
    if (cluster_rank() == 0) tma_load_multicast(data(), map, 0, 0, barrier(), 3);
  }
  mbarrier_wait(barrier(), 1);
  cluster_sync();
}

// Block 0 of a cluster sends its first 512 bytes to block 1.
void send(Out out, int to, int bytes, bool sync_at_end, bool wait, int from = 0) {
  start(1);
  store_shared(data(from) + uint32_t(thread()) * 4, float(thread()));
  fence_proxy_async();
  cluster_sync();
  if (cluster_rank() == 0) {
    if (thread() == 0) copy_to_block(to, data(from), bytes, barrier());
  } else {
    if (thread() == 0) mbarrier_arrive_expect(barrier(), bytes);
    if (wait) {
      mbarrier_wait(barrier(), 0);
      store_global(out + thread(), load_shared<float>(data(from) + uint32_t(thread()) * 4));
    }
  }
  if (sync_at_end) cluster_sync();
}
void copy(Out out, Map) { send(out, 1, 512, true, true); }
void copy_without_end(Out out, Map) { send(out, 1, 512, false, true); }
void copy_nobody_waits_for(Out out, Map) { send(out, 1, 512, true, false); }
void copy_to_itself(Out out, Map) { send(out, 0, 512, true, true); }
void copy_to_nobody(Out out, Map) { send(out, 2, 512, true, true); }
void copy_of_odd_size(Out out, Map) { send(out, 1, 520, true, true); }
void copy_over_barrier(Out out, Map) { send(out, 1, 2048, true, true, 15); }
void source_written_too_early(Out out, Map) {
  send(out, 1, 512, false, true);
  if (cluster_rank() == 0) store_shared(data() + uint32_t(thread()) * 4, 0.0f);
  cluster_sync();
}
void distant_arrival_at_the_end(Out, Map) {
  start(128);
  mbarrier_arrive_cluster(barrier(), 1 - cluster_rank());
}
void distant_arrival_waited_for(Out, Map) {
  start(128);
  mbarrier_arrive_cluster(barrier(), 1 - cluster_rank());
  mbarrier_wait(barrier(), 0);
}
void part_of_cluster(Out, Map) {
  if (cluster_rank() == 0) cluster_sync();
}

// --- Registers: 256 threads have 256 each ---

void registers(Out, Map) {
  if (warp() < 4)
    registers_decrease<24>();
  else
    registers_increase<256>();
}
// 384 threads have 168 each.
// --- Stores by the copy engine ---

enum class Store { kRight, kNoProxyFence, kNoSync, kNoWait, kOverwritten, kOverwrittenLate, kPlane, kMisaligned };
template <Store store>
void stored(Out, Map map) {
  TensorMap planes = *map;
  planes.planes = 1;
  for (int i = lane(); i < 512; i += 32) store_shared(data() + uint32_t(i) * 4, float(i));
  if (store != Store::kNoProxyFence) fence_proxy_async();
  if (store != Store::kNoSync) sync_warp();
  if (lane() == 0) {
    tma_store(&planes, 0, 0, store == Store::kPlane, data() + (store == Store::kMisaligned ? 128 : 0));
    if (store == Store::kRight || store == Store::kOverwrittenLate) tma_store_wait_read<0>();
  }
  if (store == Store::kOverwrittenLate) sync_warp();
  if (store == Store::kOverwritten || store == Store::kOverwrittenLate)
    store_shared(data() + uint32_t(lane()) * 4, 1.0f);
  if (lane() == 0 && store != Store::kNoWait) tma_store_wait<0>();
}
void load_of_planes(Out, Map map) {
  TensorMap planes = *map;
  planes.planes = 1;
  start(1);
  if (thread() == 0) tma_load(data(), &planes, 0, 0, barrier());
}

// --- Blocks that are there at once: block 0 writes what block 1 fetches, twice ---

enum class Hand {
  kRight,
  kNotTold,
  kToldByAnother,
  kNotWaited,
  kNoFence,
  kFirstProxyFence,
  kSecondProxyFence,
  kOverwritten
};
template <Hand hand>
void handed(Out out, Map map) {
  uint32_t* const counters = reinterpret_cast<uint32_t*>(out);
  uint8_t* const between = const_cast<uint8_t*>(map->data);
  start(1);
  for (uint32_t turn = 0; turn < 2; ++turn) {
    if (block() == 0) {
      if (turn == 1) {
        wait_at_least(counters + 1, 1);
        fence_gpu();
        sync_threads();
      }
      for (int i = thread() * 16; i < 2048; i += 64 * 16) store_global(between + i, Words<4>{{turn, 0, 0, 0}});
      if (hand != Hand::kFirstProxyFence) fence_proxy_async_global();
      if (hand != Hand::kToldByAnother) sync_threads();
      if (thread() == 0 && hand != Hand::kNotTold) add_release(counters, 1);
    } else if (thread() == 0) {
      if (hand == Hand::kNotWaited)
        at_least(counters, turn + 1);
      else
        wait_at_least(counters, turn + 1);
      if (hand != Hand::kNoFence) fence_gpu();
      if (hand != Hand::kSecondProxyFence) fence_proxy_async_global();
      mbarrier_arrive_expect(barrier(), 2048);
      tma_load(data(), map, 0, 0, barrier());
      if (hand == Hand::kOverwritten) add_release(counters + 1, 1);
      mbarrier_wait(barrier(), turn);
      if (hand != Hand::kOverwritten) add_release(counters + 1, 1);
    }
  }
}
void nothing(Out, Map) {}

template <int kMore>
void registers_of_three(Out, Map) {
  if (warp() < 4)
    registers_decrease<40>();
  else
    registers_increase<kMore>();
}
void increase_downwards(Out, Map) { registers_increase<160>(); }

// --- wgmma: a of ones in the first 8 KiB, b of ones in the second ---

uint64_t matrix(Shared p) { return (p >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62; }
void ones(bool fence = true) {
  for (int i = thread(); i < 4096; i += 128) store_shared(shared_base() + uint32_t(i) * 4, 0x3f803f80u);
  if (fence) fence_proxy_async();
  sync_threads();
}
void multiply(float (&d)[32], int accumulate = 1) { wgmma<0>(d, matrix(data()), matrix(data(8)), accumulate, bf16{}); }
void give(Out out, const float (&d)[32]) { store_global(out + thread(), d[0]); }

enum class But {
  kNothing,
  kNoProxyFence,
  kNoFence,
  kNoFenceAgain,
  kNoCommit,
  kNoWait,
  kReadsEarly,
  kWritesInFlight,
  kOverwritesEarly,
  kOverwritesLate,
  kOneWarpLess,
  kWarpsDiffer
};
template <But but>
void product(Out out, Map) {
  ones(but != But::kNoProxyFence);
  float d[32] = {};
  if (but != But::kNoFence) wgmma_fence();
  if (but != But::kOneWarpLess || warp() != 2) multiply(d, but == But::kWarpsDiffer ? warp() != 2 : 1);
  if (but == But::kWritesInFlight) d[3] = 0;
  multiply(d);
  wgmma_commit();
  if (but == But::kReadsEarly) give(out, d);
  if (but == But::kOverwritesEarly) store_shared(data(8) + uint32_t(thread()) * 4, 0.0f);
  if (but == But::kNoWait) return give(out, d);
  wgmma_wait<0>();
  if (but == But::kOverwritesLate) {
    sync_threads();
    store_shared(data(8) + uint32_t(thread()) * 4, 0.0f);
    sync_threads();
  }
  if (but != But::kNoFenceAgain) wgmma_fence();
  multiply(d);
  if (but != But::kNoCommit) wgmma_commit();
  wgmma_wait<0>();
  if (but != But::kReadsEarly) give(out, d);
}
// The elected thread of a warpgroup says that its stage may be overwritten, and its warps overwrite it.
void stage_released(Out out, bool wait_first) {
  start(1);
  ones();
  float d[32] = {};
  wgmma_fence();
  multiply(d);
  wgmma_commit();
  if (wait_first) wgmma_wait<0>();
  if (thread() == 0) mbarrier_arrive(barrier());
  mbarrier_wait(barrier(), 0);
  store_shared(data() + uint32_t(thread()) * 4, 0.0f);
  wgmma_wait<0>();
  give(out, d);
}
void stage_released_late(Out out, Map) { stage_released(out, true); }
void stage_released_early(Out out, Map) { stage_released(out, false); }
void descriptor(Out out, uint64_t a) {
  ones();
  float d[32] = {};
  wgmma_fence();
  wgmma<0>(d, a, matrix(data(8)), 1, bf16{});
  wgmma_commit();
  wgmma_wait<0>();
  give(out, d);
}
void descriptor_second_step(Out out, Map) { descriptor(out, matrix(data() + 32)); }
void descriptor_within_pattern(Out out, Map) { descriptor(out, matrix(data() + 256)); }
void descriptor_unswizzled(Out out, Map) { descriptor(out, matrix(data()) & ~(uint64_t(3) << 62)); }
void descriptor_beyond_shared(Out out, Map) { descriptor(out, matrix(data(12))); }
void descriptors_differ(Out out, Map) { descriptor(out, matrix(data(thread() == 100))); }

struct Case {
  const char* name;
  void (*kernel)(Out, Map);
  int threads = 128, cluster = 1;
  int together = 0;  // blocks
};
#define CASE(name, ...) {#name, name, __VA_ARGS__}
const Case cases[] = {
    CASE(arrive, 64),
    CASE(too_few_arrivals, 64),
    CASE(second_phase_never_ends, 64),
    CASE(phase_before_the_first, 64),
    CASE(missed_a_phase, 64),
    CASE(too_many_arrivals, 64),
    CASE(elected_without_sync_warp, 64),
    CASE(two_barriers_in_one_place, 64),
    CASE(writes_over_barrier, 64),
    CASE(no_barrier, 64),
    CASE(misaligned_barrier, 64),
    CASE(no_arrivals, 64),
    CASE(tma, 64),
    CASE(tma_without_wait, 64),
    CASE(tma_without_end, 64),
    CASE(one_thread_waits, 64),
    CASE(one_thread_waits_for_all, 64),
    CASE(too_many_bytes, 64),
    CASE(too_few_bytes, 64),
    CASE(tma_misaligned, 64),
    CASE(tma_beyond_shared, 64),
    CASE(tma_over_barrier, 64),
    CASE(tma_over_unread, 64),
    CASE(tma_over_stores_fenced, 64),
    CASE(tma_over_stores_unfenced, 64),
    CASE(fenced_by_one, 64),
    CASE(multicast_to_both, 64, 2),
    CASE(multicast_to_one, 64, 2),
    CASE(multicast_to_nobody, 64, 2),
    CASE(multicast_without_wait, 64, 2),
    CASE(multicast_over_unread, 64, 2),
    CASE(copy, 128, 2),
    CASE(copy_without_end, 128, 2),
    CASE(copy_nobody_waits_for, 128, 2),
    CASE(copy_to_itself, 128, 2),
    CASE(copy_to_nobody, 128, 2),
    CASE(copy_of_odd_size, 128, 2),
    CASE(copy_over_barrier, 128, 2),
    CASE(source_written_too_early, 128, 2),
    CASE(distant_arrival_at_the_end, 128, 2),
    CASE(distant_arrival_waited_for, 128, 2),
    CASE(part_of_cluster, 64, 2),
    {"store", stored<Store::kRight>, 32},
    {"store_without_proxy_fence", stored<Store::kNoProxyFence>, 32},
    {"store_without_sync_warp", stored<Store::kNoSync>, 32},
    {"store_without_wait", stored<Store::kNoWait>, 32},
    {"store_overwritten_early", stored<Store::kOverwritten>, 32},
    {"store_overwritten_late", stored<Store::kOverwrittenLate>, 32},
    {"store_to_no_plane", stored<Store::kPlane>, 32},
    {"store_misaligned", stored<Store::kMisaligned>, 32},
    CASE(load_of_planes, 64),
    {"hand_over", handed<Hand::kRight>, 64, 1, 2},
    {"hand_over_not_told", handed<Hand::kNotTold>, 64, 1, 2},
    {"hand_over_told_by_another", handed<Hand::kToldByAnother>, 64, 1, 2},
    {"hand_over_not_waited_for", handed<Hand::kNotWaited>, 64, 1, 2},
    {"hand_over_without_fence", handed<Hand::kNoFence>, 64, 1, 2},
    {"hand_over_without_first_proxy_fence", handed<Hand::kFirstProxyFence>, 64, 1, 2},
    {"hand_over_without_second_proxy_fence", handed<Hand::kSecondProxyFence>, 64, 1, 2},
    {"hand_over_overwritten", handed<Hand::kOverwritten>, 64, 1, 2},
    {"too_many_at_once", nothing, 64, 1, 5},
    CASE(registers, 256),
    {"registers_of_three", registers_of_three<232>, 384},
    {"registers_that_are_not_there", registers_of_three<240>, 384},
    CASE(increase_downwards, 256),
    {"product", product<But::kNothing>},
    {"product_without_proxy_fence", product<But::kNoProxyFence>},
    {"product_without_fence", product<But::kNoFence>},
    {"product_without_second_fence", product<But::kNoFenceAgain>},
    {"product_without_commit", product<But::kNoCommit>},
    {"product_without_wait", product<But::kNoWait>},
    {"product_read_early", product<But::kReadsEarly>},
    {"product_written_in_flight", product<But::kWritesInFlight>},
    {"product_operand_written_early", product<But::kOverwritesEarly>},
    {"product_operand_written_unfenced", product<But::kOverwritesLate>},
    {"product_of_three_warps", product<But::kOneWarpLess>},
    {"product_of_different_warps", product<But::kWarpsDiffer>},
    CASE(stage_released_late),
    CASE(stage_released_early),
    CASE(descriptor_second_step),
    CASE(descriptor_within_pattern),
    CASE(descriptor_unswizzled),
    CASE(descriptor_beyond_shared),
    CASE(descriptors_differ),
};

}  // namespace
}  // namespace flatlora

#define EXPORT extern "C" __attribute__((visibility("default")))

// The error of the launch; -1 for an unknown name. `in` is 16 x 64 of 16 bits, `out` has 128 floats.
EXPORT int run_case(const char* name, float* out, const void* in) {
  namespace gpu = flatlora::gpu;
  for (const auto& c : flatlora::cases) {
    if (strcmp(c.name, name)) continue;
    gpu::TensorMap map;
    if (gpu::encode_tensor_map(&map, in, 16, 64, 128, 16, true)) return -2;
    gpu::allow_memory(in, 2048, true);
    gpu::allow_memory(out, 128 * 4, true);
    gpu::Launch how{c.together ? c.together : c.cluster, c.threads, 16384 + 16, nullptr, c.cluster};
    how.together = c.together > 0;
    if (how.together) gpu::clear(out, 8, nullptr);
    const gpu::Error error = gpu::launch(c.kernel, how, out, static_cast<const gpu::TensorMap*>(&map));
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
