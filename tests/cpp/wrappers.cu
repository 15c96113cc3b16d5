// One small kernel for each function of csrc/cuda/ptx.h, for tests/csrc/test_wrappers.py, which knows what must come
// out. Compiled by nvcc for a GPU, and with FLATLORA_EMULATED by a C++ compiler for the emulator. FLATLORA_TEST_SM90:
// with what only sm_90a has.
#include <cstring>
#include <string>

#include "../../csrc/cuda/launch.h"

namespace {

using namespace flatlora;
using namespace flatlora::gpu;

// --- Where a thread is ---

FLATLORA_KERNEL(64, 1) position(const uint8_t*, uint8_t* out) {
  const int64_t me = block() * 64 + thread();
  const int values[6] = {thread(), warp(), lane(), int(block()), int(blocks()), uniform(warp() + 100)};
  for (int i = 0; i < 6; ++i) store_global(out + (me * 6 + i) * 4, uint32_t(values[i]));
}

// --- Memory and barriers ---

// Through shared memory: element i comes out at 31 - i.
template <class V>
FLATLORA_KERNEL(32, 1)
shared(const uint8_t* in, uint8_t* out) {
  const Shared base = shared_base();
  const auto size = uint32_t(sizeof(V));
  store_shared(base + uint32_t(31 - lane()) * size, load_global<V>(in + lane() * sizeof(V)));
  sync_warp();
  store_global(out + lane() * sizeof(V), load_shared<V>(base + uint32_t(lane()) * size));
}

FLATLORA_KERNEL(32, 1) global_once(const uint8_t* in, uint8_t* out) {
  store_global(out + 16 * lane(), load_global_once(in + 16 * lane()));
}

// Each thread of 128 gets what the one across has; `kThreads` meet.
template <int kThreads>
FLATLORA_KERNEL(128, 1)
exchange(const uint8_t* in, uint8_t* out) {
  const Shared base = shared_base();
  const int group = thread() / kThreads, me = thread() % kThreads;
  store_shared(base + uint32_t(thread()) * 4, load_global<uint32_t>(in + thread() * 4));
  if constexpr (kThreads == 128)
    sync_threads();
  else if constexpr (kThreads == 64)
    sync_named(1 + group, 64);
  else
    sync_warp();
  const int other = group * kThreads + kThreads - 1 - me;
  store_global(out + thread() * 4, load_shared<uint32_t>(base + uint32_t(other) * 4));
}

FLATLORA_KERNEL(32, 1) shuffles(const uint8_t* in, uint8_t* out) {
  for (int mask = 1; mask < 32; ++mask) {
    const int64_t at = ((mask - 1) * 32 + lane()) * 8;
    store_global(out + at, shuffle_xor(load_global<uint32_t>(in + 4 * lane()), mask));
    store_global(out + at + 4, shuffle_xor(load_global<float>(in + 4 * lane()), mask));
  }
}

FLATLORA_KERNEL(32, 1) votes(const uint8_t* in, uint8_t* out) {
  const auto x = load_global<uint32_t>(in + 4 * lane());
  store_global(out + 8 * lane(), shuffle(load_global<float>(in + 4 * lane()), lane() * 7 % 32));
  store_global(out + 8 * lane() + 4, vote(x & 1));
}

// --- Arithmetic: 32 inputs at a time ---

FLATLORA_KERNEL(32, 1) integers(const uint8_t* in, uint8_t* out) {
  const auto w = load_global<Words<4>>(in + 16 * lane());
  const uint32_t values[] = {byte_permute(w.v[0], w.v[1], w.v[2]), xor_masked(w.v[0], w.v[1], w.v[3]),
                             rotate_right(w.v[0], 5), reverse_bits(w.v[0]), uint32_t(count_bits(w.v[0]))};
  for (int i = 0; i < 5; ++i) store_global(out + 20 * lane() + 4 * i, values[i]);
}

FLATLORA_KERNEL(32, 1) pairs(const uint8_t* in, uint8_t* out) {
  const int64_t i = block() * 32 + lane();
  const auto w = load_global<Words<4>>(in + 16 * i);
  store_global(out + 4 * i, fma_bf16(w.v[0], w.v[1], w.v[2]));
}

template <int kWhich>
FLATLORA_KERNEL(32, 1)
convert(const uint8_t* in, uint8_t* out) {
  const int64_t i = block() * 32 + lane();
  const auto x = load_global<float>(in + 4 * i);
  const auto bits = load_global<uint32_t>(in + 4 * i);
  uint8_t* to = out + 4 * i;
  if constexpr (kWhich == 0) store_global(to, log2_approx(x));
  if constexpr (kWhich == 1) store_global(to, sqrt_approx(x));
  if constexpr (kWhich == 2) store_global(to, sin_approx(x));
  if constexpr (kWhich == 3) store_global(to, cos_approx(x));
  if constexpr (kWhich == 4) store_global(to, pack_bf16(x, -x));
  if constexpr (kWhich == 5) store_global(to, pack_f16(x, -x));
  if constexpr (kWhich == 6) store_global(to, f16_to_float(uint16_t(bits)));
  if constexpr (kWhich == 7) store_global(to, to_tf32(x));
}

// --- Asynchronous copies of sm_80 ---

// Lane l copies `l % (kBytes + 1)` bytes, rounded down to an even number.
template <int kBytes>
FLATLORA_KERNEL(32, 1)
copies(const uint8_t* in, uint8_t* out) {
  const Shared mine = shared_base() + uint32_t(lane() * kBytes);
  const int valid = lane() % (kBytes + 1) & ~1;
  cp_async<kBytes>(mine, in + lane() * kBytes, valid);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < kBytes; i += 4)
    store_global(out + lane() * kBytes + i, load_shared<uint32_t>(mine + uint32_t(i)));
}

// Four groups, of which all but `kPending` are waited for.
template <int kPending>
FLATLORA_KERNEL(32, 1)
copy_groups(const uint8_t* in, uint8_t* out) {
  const Shared mine = shared_base() + uint32_t(lane()) * 16;
  for (int group = 0; group < 4; ++group) {
    cp_async<16>(mine + uint32_t(group) * 512, in + group * 512 + lane() * 16);
    cp_async_commit();
  }
  cp_async_wait<kPending>();
  for (int group = 0; group < 4 - kPending; ++group)
    store_global(out + group * 512 + lane() * 16, load_shared<Words<4>>(mine + uint32_t(group) * 512));
  cp_async_wait<0>();
}

// --- Matrices of a warp ---

// 512 bytes: 32 rows of 8 elements.
template <bool kTransposed>
FLATLORA_KERNEL(32, 1)
matrices(const uint8_t* in, uint8_t* out) {
  const Shared row = shared_base() + uint32_t(lane()) * 16;
  store_shared(row, load_global<Words<4>>(in + lane() * 16));
  sync_warp();
  uint32_t r[4];
  if constexpr (kTransposed)
    ldmatrix_trans(r, row);
  else
    ldmatrix(r, row);
  for (int i = 0; i < 4; ++i) store_global(out + lane() * 16 + i * 4, r[i]);
}

// Of each lane: a (4 words), b (2), d (4); d + a b comes out.
template <class T>
FLATLORA_KERNEL(32, 1)
products(const uint8_t* in, uint8_t* out) {
  in += lane() * 40;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = load_global<uint32_t>(in + 4 * i);
  for (int i = 0; i < 2; ++i) b[i] = load_global<uint32_t>(in + 16 + 4 * i);
  for (int i = 0; i < 4; ++i) d[i] = load_global<float>(in + 24 + 4 * i);
  if constexpr (sizeof(T) == 2)
    mma(d, a, b, T{});
  else
    mma_tf32(d, a, b);
  for (int i = 0; i < 4; ++i) store_global(out + lane() * 16 + i * 4, d[i]);
}

#if defined(FLATLORA_TEST_SM90)

// --- sm_90a ---

// Two warps take turns through two barriers: 0 writes, 1 negates, 0 reads, four times.
FLATLORA_KERNEL(64, 1) turns(const uint8_t* in, uint8_t* out) {
  const Shared to_1 = shared_base(), to_0 = to_1 + 8, mine = to_1 + 128 + uint32_t(lane()) * 4;
  if (thread() == 0) {
    mbarrier_init(to_1, 32);
    mbarrier_init(to_0, 1);
  }
  sync_threads();
  for (int i = 0; i < 4; ++i) {
    if (warp() == 0) {
      store_shared(mine, load_global<uint32_t>(in + (i * 32 + lane()) * 4));
      const bool early = mbarrier_test(to_0, uint32_t(i % 2));
      mbarrier_arrive(to_1);
      mbarrier_wait(to_0, uint32_t(i % 2));
      const bool right = !early && mbarrier_test(to_0, uint32_t(i % 2));
      store_global(out + (i * 32 + lane()) * 4, right ? load_shared<uint32_t>(mine) : 0u);
    } else {
      mbarrier_wait(to_1, uint32_t(i % 2));
      store_shared(mine, ~load_shared<uint32_t>(mine));
      sync_warp();
      if (lane() == 0) mbarrier_arrive(to_0);
    }
  }
}

// The box of 16 x 64 at (row, column), as it lies in shared memory.
FLATLORA_KERNEL(64, 1)
box(FLATLORA_GRID_CONSTANT const TensorMap map, int row, int column, uint8_t* out) {
  const Shared tile = shared_base(), barrier = tile + 2048;
  if (thread() == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  sync_threads();
  if (thread() == 0) {
    mbarrier_arrive_expect(barrier, 2048);
    tma_load(tile, &map, column, row, barrier);
  }
  mbarrier_wait(barrier, 0);
  for (int i = thread() * 16; i < 2048; i += 64 * 16) store_global(out + i, load_shared<Words<4>>(tile + uint32_t(i)));
}

// 512 bytes: 32 rows of 8 elements, which lie where the lanes say.
FLATLORA_KERNEL(32, 1) stored_matrices(const uint8_t* in, uint8_t* out) {
  const Shared row = shared_base() + uint32_t(lane()) * 16;
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = load_global<uint32_t>(in + lane() * 16 + i * 4);
  stmatrix(row, r);
  sync_warp();
  store_global(out + lane() * 16, load_shared<Words<4>>(row));
}

// Two boxes of 16 x 64, as they are to lie in shared memory, to (row, column) of planes 0 and 1; then the first one's
// complement to plane 2.
FLATLORA_KERNEL(32, 1)
stored_boxes(FLATLORA_GRID_CONSTANT const TensorMap map, int row, int column, const uint8_t* in) {
  const Shared tile = shared_base();
  for (int i = lane() * 16; i < 4096; i += 32 * 16) store_shared(tile + uint32_t(i), load_global<Words<4>>(in + i));
  fence_proxy_async();
  sync_warp();
  if (lane() == 0) {
    tma_store(&map, column, row, 0, tile);
    tma_store(&map, column, row, 1, tile + 2048);
    tma_store_wait_read<1>();
  }
  sync_warp();
  for (int i = lane() * 16; i < 2048; i += 32 * 16) {
    auto w = load_global<Words<4>>(in + i);
    for (uint32_t& word : w.v) word = ~word;
    store_shared(tile + uint32_t(i), w);
  }
  fence_proxy_async();
  sync_warp();
  if (lane() == 0) {
    tma_store(&map, column, row, 2, tile);
    tma_store_wait<0>();
  }
}

// Blocks that are there at once, in a circle. Each writes 16 x 64 elements into global memory, and gives those of the
// block after it, which come by the copy engine.
FLATLORA_KERNEL(64, 1)
hand_over(FLATLORA_GRID_CONSTANT const TensorMap map, const uint8_t* in, uint8_t* between, uint32_t* counters,
          uint8_t* out) {
  const Shared tile = shared_base(), barrier = tile + 2048;
  const int64_t me = block(), next = (me + 1) % blocks();
  for (int i = thread() * 16; i < 2048; i += 64 * 16)
    store_global(between + me * 2048 + i, load_global<Words<4>>(in + me * 2048 + i));
  fence_proxy_async_global();
  sync_threads();
  if (thread() == 0) {
    add_release(counters + me, 3);
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    wait_at_least(counters + next, 3);
    fence_gpu();
    fence_proxy_async_global();
    mbarrier_arrive_expect(barrier, 2048);
    if (at_least(counters + next, 3) && !at_least(counters + next, 4)) tma_load(tile, &map, 0, int(next) * 16, barrier);
  }
  sync_threads();
  mbarrier_wait(barrier, 0);
  for (int i = thread() * 16; i < 2048; i += 64 * 16)
    store_global(out + me * 2048 + i, load_shared<Words<4>>(tile + uint32_t(i)));
}

// In a cluster of two, each block loads half of the box, for both. Both give what they got.
FLATLORA_KERNEL(64, 1)
shared_box(FLATLORA_GRID_CONSTANT const TensorMap map, int row, int column, uint8_t* out) {
  const Shared tile = shared_base(), barrier = tile + 4096;
  if (thread() == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  cluster_sync();
  if (thread() == 0) {
    const int half = cluster_rank();
    mbarrier_arrive_expect(barrier, 4096);
    tma_load_multicast(tile + uint32_t(half) * 2048, &map, column, row + half * 16, barrier, 3);
  }
  mbarrier_wait(barrier, 0);
  for (int i = thread() * 16; i < 4096; i += 64 * 16)
    store_global(out + block() * 4096 + i, load_shared<Words<4>>(tile + uint32_t(i)));
}

// In a cluster of two: block 0 sends 1024 bytes; block 1 stores them, says so, and gets their complement as well.
FLATLORA_KERNEL(64, 1) send(const uint8_t* in, uint8_t* out) {
  const Shared tile = shared_base(), full = tile + 1024, empty = tile + 1032, mine = tile + uint32_t(thread()) * 16;
  const int rank = cluster_rank();
  if (thread() == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, 64);
    fence_mbarrier_init();
  }
  cluster_sync();
  for (uint32_t i = 0; i < 2; ++i) {
    if (rank == 0) {
      if (i == 1) mbarrier_wait(empty, 0);
      auto w = load_global<Words<4>>(in + thread() * 16);
      for (uint32_t& word : w.v) word ^= 0 - i;
      store_shared(mine, w);
      fence_proxy_async();
      sync_threads();
      if (thread() == 0) copy_to_block(1, tile, 1024, full);
    } else {
      if (thread() == 0) mbarrier_arrive_expect(full, 1024);
      mbarrier_wait(full, i);
      store_global(out + i * 1024 + thread() * 16, load_shared<Words<4>>(mine));
      mbarrier_arrive_cluster(empty, 0);
    }
  }
  store_global(out + 2048 + (block() * 64 + thread()) * 4, uint32_t(rank));
  cluster_sync();
}

FLATLORA_KERNEL(256, 1) registers(const uint8_t* in, uint8_t* out) {
  auto x = load_global<uint32_t>(in + 4 * thread());
  if (warp() < 4) {
    registers_decrease<40>();
    x *= 3;
  } else {
    registers_increase<256>();
    x *= 5;
  }
  store_global(out + 4 * thread(), x);
}

// `in`: the descriptors of a and b for each step, as if shared memory began at 0, then 32 KiB for a and as much for b.
// The first half of the steps makes one product, the second half is added to ones. All registers come out.
template <int kRegisters, int kTransposed, class T>
FLATLORA_KERNEL(128, 1)
warpgroup_products(const uint8_t* in, uint8_t* out) {
  constexpr int kSteps = kTransposed ? 4 : 8, kBytes = 64 << 10;
  const Shared base = shared_base();
  Words<4> steps[kSteps];
  FLATLORA_UNROLL
  for (int i = 0; i < kSteps; ++i) {
    steps[i] = load_global<Words<4>>(in + 16 * i);
    steps[i].v[0] += base >> 4;
    steps[i].v[2] += base >> 4;
  }
  for (int i = thread() * 16; i < kBytes; i += 128 * 16)
    store_shared(base + uint32_t(i), load_global<Words<4>>(in + 16 * kSteps + i));
  fence_proxy_async();
  sync_threads();
  float low[kRegisters], high[kRegisters];
  FLATLORA_UNROLL
  for (int i = 0; i < kRegisters; ++i) low[i] = high[i] = 1.0f;
  const auto group = [&](float (&d)[kRegisters], int first) {
    wgmma_fence();
    FLATLORA_UNROLL
    for (int i = first; i < first + kSteps / 2; ++i)
      wgmma<kTransposed>(d, uint64_t(steps[i].v[1]) << 32 | steps[i].v[0],
                         uint64_t(steps[i].v[3]) << 32 | steps[i].v[2], i > 0, T{});
    wgmma_commit();
  };
  wgmma_hold(low);
  wgmma_hold(high);
  group(low, 0);
  group(high, kSteps / 2);
  out += thread() * kRegisters * 8;
  wgmma_wait<1>();
  wgmma_hold(low);
  FLATLORA_UNROLL
  for (int i = 0; i < kRegisters; ++i) store_global(out + i * 4, low[i]);
  wgmma_wait<0>();
  wgmma_hold(high);
  FLATLORA_UNROLL
  for (int i = 0; i < kRegisters; ++i) store_global(out + (kRegisters + i) * 4, high[i]);
}

#endif

// --- The host's side ---

using Kernel = void (*)(const uint8_t*, uint8_t*);
struct Case {
  const char* name;
  Kernel kernel;
  int blocks, threads, shared_bytes;
};

const Case cases[] = {
    {"position", position, 3, 64, 0},
    {"shared uint16", shared<uint16_t>, 1, 32, 512},
    {"shared uint32", shared<uint32_t>, 1, 32, 512},
    {"shared float", shared<float>, 1, 32, 512},
    {"shared words 2", shared<Words<2>>, 1, 32, 512},
    {"shared words 4", shared<Words<4>>, 1, 32, 512},
    {"global_once", global_once, 1, 32, 0},
    {"exchange 32", exchange<32>, 1, 128, 512},
    {"exchange 64", exchange<64>, 1, 128, 512},
    {"exchange 128", exchange<128>, 1, 128, 512},
    {"shuffles", shuffles, 1, 32, 0},
    {"votes", votes, 1, 32, 0},
    {"integers", integers, 1, 32, 0},
    {"pairs", pairs, 64, 32, 0},
    {"log2_approx", convert<0>, 8, 32, 0},
    {"sqrt_approx", convert<1>, 8, 32, 0},
    {"sin_approx", convert<2>, 8, 32, 0},
    {"cos_approx", convert<3>, 8, 32, 0},
    {"pack_bf16", convert<4>, 8, 32, 0},
    {"pack_f16", convert<5>, 8, 32, 0},
    {"f16_to_float", convert<6>, 8, 32, 0},
    {"to_tf32", convert<7>, 8, 32, 0},
    {"copies 4", copies<4>, 1, 32, 512},
    {"copies 8", copies<8>, 1, 32, 512},
    {"copies 16", copies<16>, 1, 32, 512},
    {"copy_groups 0", copy_groups<0>, 1, 32, 2048},
    {"copy_groups 2", copy_groups<2>, 1, 32, 2048},
    {"ldmatrix", matrices<false>, 1, 32, 512},
    {"ldmatrix_trans", matrices<true>, 1, 32, 512},
    {"mma bf16", products<bf16>, 1, 32, 0},
    {"mma f16", products<f16>, 1, 32, 0},
    {"mma_tf32", products<float>, 1, 32, 0},
#if defined(FLATLORA_TEST_SM90)
    {"turns", turns, 1, 64, 512},
    {"stmatrix", stored_matrices, 1, 32, 512},
    {"registers", registers, 1, 256, 0},
    {"wgmma 64 bf16", warpgroup_products<32, 0, bf16>, 1, 128, 64 << 10},
    {"wgmma 64 f16", warpgroup_products<32, 0, f16>, 1, 128, 64 << 10},
    {"wgmma 64 bf16 transposed", warpgroup_products<32, 1, bf16>, 1, 128, 64 << 10},
    {"wgmma 64 f16 transposed", warpgroup_products<32, 1, f16>, 1, 128, 64 << 10},
    {"wgmma 128 bf16", warpgroup_products<64, 0, bf16>, 1, 128, 64 << 10},
    {"wgmma 128 f16", warpgroup_products<64, 0, f16>, 1, 128, 64 << 10},
    {"wgmma 128 bf16 transposed", warpgroup_products<64, 1, bf16>, 1, 128, 64 << 10},
    {"wgmma 128 f16 transposed", warpgroup_products<64, 1, f16>, 1, 128, 64 << 10},
#endif
};

#if defined(FLATLORA_EMULATED)
#define EXPORT extern "C" __attribute__((visibility("default")))
void* to_device(const void* data, int64_t) { return const_cast<void*>(data); }
int finish(int error, void*, void*, void*, int64_t) { return error; }
#else
#define EXPORT extern "C"
void* to_device(const void* data, int64_t bytes) {
  void* p = nullptr;
  if (cudaMalloc(&p, size_t(bytes)) == cudaSuccess) cudaMemcpy(p, data, size_t(bytes), cudaMemcpyHostToDevice);
  return p;
}
int finish(int error, void* in, void* out, void* to, int64_t bytes) {
  if (error == 0) error = cudaMemcpy(to, out, size_t(bytes), cudaMemcpyDeviceToHost);
  cudaFree(in);
  cudaFree(out);
  return error;
}
#endif

}  // namespace

EXPORT const char* test_error(int error) {
#if defined(FLATLORA_EMULATED)
  return error_text(error);
#else
  return cudaGetErrorString(cudaError_t(error));
#endif
}

// How many clusters of so many blocks (2 or more), each with this shared memory, run at once.
EXPORT int test_clusters(int size, int shared_bytes, int* count) {
#if defined(FLATLORA_EMULATED)
  int64_t architecture, processors, limit;
  emulated_device(&architecture, &processors, &limit);
  *count = shared_bytes <= limit ? int(processors / size) : 0;
  return 0;
#else
  const auto kernel = reinterpret_cast<const void*>(&position);
  const LaunchConfig launch({size, 64, shared_bytes - 1024, nullptr, size});
  int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == 0 && size > 8) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error ? error : cudaOccupancyMaxActiveClusters(count, kernel, &launch.config);
#endif
}

EXPORT int test_run(const char* name, const void* in, int64_t in_bytes, void* out, int64_t out_bytes) {
  for (const Case& test : cases) {
    if (std::string(test.name) != name) continue;
    void* from = to_device(in, in_bytes);
    void* to = to_device(out, out_bytes);
    const int error = launch(test.kernel, {test.blocks, test.threads, test.shared_bytes, nullptr},
                             static_cast<const uint8_t*>(from), static_cast<uint8_t*>(to));
    return finish(error, from, to, out, out_bytes);
  }
  return -1;
}

#if defined(FLATLORA_TEST_SM90)
EXPORT int test_send(const void* in, void* out) {
  void* from = to_device(in, 1024);
  void* to = to_device(out, 2560);
  const int error =
      launch(send, {2, 64, 1040, nullptr, 2}, static_cast<const uint8_t*>(from), static_cast<uint8_t*>(to));
  return finish(error, from, to, out, 2560);
}

EXPORT int test_box(const void* matrix, int64_t rows, int64_t columns, int64_t row_bytes, int64_t row, int64_t column,
                    void* out) {
  void* from = to_device(matrix, rows * row_bytes);
  void* to = to_device(out, 2048);
  TensorMap map;
  int error = encode_tensor_map(&map, from, rows, columns, row_bytes, 16, false);
  if (error == 0) error = launch(box, {1, 64, 2056, nullptr}, map, int(row), int(column), static_cast<uint8_t*>(to));
  return finish(error, from, to, out, 2048);
}

EXPORT int test_shared_box(const void* matrix, int64_t rows, int64_t columns, int64_t row_bytes, int64_t row,
                           int64_t column, void* out) {
  void* from = to_device(matrix, rows * row_bytes);
  void* to = to_device(out, 8192);
  TensorMap map;
  int error = encode_tensor_map(&map, from, rows, columns, row_bytes, 16, false);
  if (error == 0)
    error = launch(shared_box, {2, 64, 4104, nullptr, 2}, map, int(row), int(column), static_cast<uint8_t*>(to));
  return finish(error, from, to, out, 8192);
}

EXPORT int test_stored_boxes(const void* in, int64_t row, int64_t column, void* matrices, int64_t rows,
                             int64_t columns) {
  const int64_t bytes = 3 * rows * columns * 2;
  void* from = to_device(in, 4096);
  void* to = to_device(matrices, bytes);
  TensorMap map;
  int error = encode_tensor_maps(&map, to, 3, rows, columns, columns * 2, 16, false);
  if (error == 0)
    error = launch(stored_boxes, {1, 32, 4096, nullptr}, map, int(row), int(column), static_cast<const uint8_t*>(from));
  return finish(error, from, to, matrices, bytes);
}

// `in` and `out`: 2048 bytes for each block; `out` then has as many for what is handed over, and the counters.
EXPORT int test_hand_over(const void* in, void* out, int64_t blocks) {
  const int64_t bytes = blocks * 2048;
  void* from = to_device(in, bytes);
  void* to = to_device(out, 2 * bytes + blocks * 4);
  uint8_t* const between = static_cast<uint8_t*>(to) + bytes;
  uint32_t* const counters = reinterpret_cast<uint32_t*>(between + bytes);
  TensorMap map;
  int error = encode_tensor_map(&map, between, blocks * 16, 64, 128, 16, false);
  if (error == 0) error = clear(counters, blocks * 4, nullptr);
  Launch how = {blocks, 64, 2056, nullptr};
  how.together = true;
  if (error == 0)
    error =
        launch(hand_over, how, map, static_cast<const uint8_t*>(from), between, counters, static_cast<uint8_t*>(to));
  return finish(error, from, to, out, 2 * bytes + blocks * 4);
}

EXPORT int test_encode(const void* data, int64_t rows, int64_t columns, int64_t row_bytes, int64_t box_rows) {
  TensorMap map;
  return encode_tensor_map(&map, data, rows, columns, row_bytes, int(box_rows), true);
}
#endif
