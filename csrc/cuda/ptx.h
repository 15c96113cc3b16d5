// All PTX. Names follow the instructions; the twin for the CPU is ../emulator/ptx.h. Include device.h, not this.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace flatlora {
namespace gpu {

// --- Where a thread is ---

FLATLORA_DEVICE int thread() { return int(threadIdx.x); }
FLATLORA_DEVICE int warp() { return int(threadIdx.x) / 32; }
FLATLORA_DEVICE int lane() { return int(threadIdx.x) % 32; }
FLATLORA_DEVICE int64_t block() { return blockIdx.x; }
FLATLORA_DEVICE int64_t blocks() { return gridDim.x; }
FLATLORA_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
// `x`, of which the compiler may assume that it is the same in all lanes.
FLATLORA_DEVICE int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// --- Memory ---

// Start of the dynamic shared memory, aligned to 1024 bytes by the launcher's surplus.
FLATLORA_DEVICE Shared shared_base() {
  extern __shared__ uint8_t bytes[];
  return (uint32_t(__cvta_generic_to_shared(bytes)) + 1023u) & ~1023u;
}

template <class V>
FLATLORA_DEVICE V load_shared(Shared p);
template <>
FLATLORA_DEVICE uint16_t load_shared(Shared p) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(p) : "memory");
  return v;
}
template <>
FLATLORA_DEVICE uint32_t load_shared(Shared p) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(p) : "memory");
  return v;
}
template <>
FLATLORA_DEVICE float load_shared(Shared p) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(p) : "memory");
  return v;
}
template <>
FLATLORA_DEVICE Words<2> load_shared(Shared p) {
  Words<2> w;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(w.v[0]), "=r"(w.v[1]) : "r"(p) : "memory");
  return w;
}
template <>
FLATLORA_DEVICE Words<4> load_shared(Shared p) {
  Words<4> w;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3])
               : "r"(p)
               : "memory");
  return w;
}

FLATLORA_DEVICE void store_shared(Shared p, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(p), "h"(v) : "memory");
}
FLATLORA_DEVICE void store_shared(Shared p, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(p), "r"(v) : "memory");
}
FLATLORA_DEVICE void store_shared(Shared p, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(p), "f"(v) : "memory");
}
FLATLORA_DEVICE void store_shared(Shared p, Words<2> w) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(p), "r"(w.v[0]), "r"(w.v[1]) : "memory");
}
FLATLORA_DEVICE void store_shared(Shared p, Words<4> w) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(p), "r"(w.v[0]), "r"(w.v[1]), "r"(w.v[2]), "r"(w.v[3])
               : "memory");
}

// V: a scalar or Words, aligned to its size.
template <class V>
FLATLORA_DEVICE V load_global(const void* p) {
  return *static_cast<const V*>(p);
}
// 16 bytes that nobody writes during the kernel and that are read once.
FLATLORA_DEVICE Words<4> load_global_once(const void* p) {
  Words<4> w;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3])
               : "l"(p));
  return w;
}
template <class V>
FLATLORA_DEVICE void store_global(void* p, V v) {
  *static_cast<V*>(p) = v;
}
// One instruction also where the compiler sees what lies beside it.
template <>
FLATLORA_DEVICE void store_global(void* p, Words<4> w) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w.v[0]), "r"(w.v[1]), "r"(w.v[2]), "r"(w.v[3])
               : "memory");
}

// --- Between blocks that run at the same time: counters in global memory ---

// After what this thread did, and what it has seen, of the whole GPU.
FLATLORA_DEVICE void add_release(uint32_t* counter, uint32_t n) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(n) : "memory");
}
// Whether the counter has come as far. What was done before that is seen after fence_gpu.
FLATLORA_DEVICE bool at_least(const uint32_t* counter, uint32_t least) {
  uint32_t n;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(n) : "l"(counter) : "memory");
  return n >= least;
}
// Until it has.
FLATLORA_DEVICE void wait_at_least(const uint32_t* counter, uint32_t least) {
  while (!at_least(counter, least)) __nanosleep(32);
}
FLATLORA_DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// --- Within a block ---

FLATLORA_DEVICE void sync_threads() { __syncthreads(); }
FLATLORA_DEVICE void sync_warp() { __syncwarp(); }
// The barrier `id` (1 to 15) of `threads` threads, a multiple of 32.
FLATLORA_DEVICE void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FLATLORA_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
FLATLORA_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
FLATLORA_DEVICE float shuffle(float x, int lane) { return __shfl_sync(~0u, x, lane); }
// Bit l: `x` of lane l.
FLATLORA_DEVICE uint32_t vote(bool x) { return __ballot_sync(~0u, x); }

// --- Arithmetic ---

FLATLORA_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
// a ^ (b & mask) as one instruction, which the compiler does not know.
FLATLORA_DEVICE uint32_t xor_masked(uint32_t a, uint32_t b, uint32_t mask) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0x78;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
  return d;
}
FLATLORA_DEVICE uint32_t rotate_right(uint32_t x, int bits) { return __funnelshift_r(x, x, bits); }
FLATLORA_DEVICE uint32_t reverse_bits(uint32_t x) { return __brev(x); }
FLATLORA_DEVICE int count_bits(uint32_t x) { return __popc(x); }
FLATLORA_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FLATLORA_DEVICE float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FLATLORA_DEVICE float sin_approx(float x) {
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FLATLORA_DEVICE float cos_approx(float x) {
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Round to nearest even; `low` goes to bits 0..15.
FLATLORA_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
}
FLATLORA_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t w;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
}
// a b + c of pairs of bfloat16, rounded once to nearest even; subnormal numbers count.
FLATLORA_DEVICE uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
FLATLORA_DEVICE float f16_to_float(uint16_t bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}
// To nearest, ties away from zero.
FLATLORA_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// --- sm_80: asynchronous copies and warp-wide matrix products ---

// Copies `valid` of kBytes (4, 8, 16) bytes and fills the rest with zeros; nothing is read where `valid` is 0.
template <int kBytes>
FLATLORA_DEVICE void cp_async(Shared to, const void* from, int valid = kBytes) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(valid)
                 : "memory");
  }
}
FLATLORA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `pending` of this thread's groups are under way.
template <int pending>
FLATLORA_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
FLATLORA_DEVICE void ldmatrix(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
FLATLORA_DEVICE void ldmatrix_trans(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// d += a b, m16n8k16 with 16-bit operands.
FLATLORA_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FLATLORA_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d += a b, m16n8k8 with tf32 operands (see to_tf32; without it the low bits are cut off).
FLATLORA_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- sm_90a: barriers in memory, the copy engine, clusters, warpgroup-wide matrix products ---

// Only code for sm_90a contains these; other passes of the compiler see functions without a body.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FLATLORA_SM90(...) __VA_ARGS__
#else
#define FLATLORA_SM90(...) __trap()
#endif

FLATLORA_DEVICE void mbarrier_init(Shared barrier, int arrivals) {
  FLATLORA_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory"));
}
// Makes initialised barriers visible to the cluster and the copy engine; before cluster_sync or sync_threads.
FLATLORA_DEVICE void fence_mbarrier_init() {
  FLATLORA_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}
FLATLORA_DEVICE void mbarrier_arrive(Shared barrier) {
  FLATLORA_SM90(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"));
}
// Arrives, and makes the phase wait for `bytes` of asynchronous copies as well.
FLATLORA_DEVICE void mbarrier_arrive_expect(Shared barrier, int bytes) {
  FLATLORA_SM90(
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory"));
}
// Arrives at the barrier that block `rank` of the cluster has at this address. Like the waits without a scope, which of
// the cluster would become fences of the whole GPU: what is handed over are stages that nobody reads any more.
FLATLORA_DEVICE void mbarrier_arrive_cluster(Shared barrier, int rank) {
  FLATLORA_SM90(
      asm volatile("{\n"
                   ".reg .b32 remote;\n"
                   "mapa.shared::cluster.u32 remote, %0, %1;\n"
                   "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
                   "}" ::"r"(barrier),
                   "r"(rank) : "memory"));
}
// Until the phase of this parity has ended.
FLATLORA_DEVICE void mbarrier_wait(Shared barrier, uint32_t parity) {
  FLATLORA_SM90(
      asm volatile("{\n"
                   ".reg .pred done;\n"
                   "again:\n"
                   "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                   "@!done bra again;\n"
                   "}" ::"r"(barrier),
                   "r"(parity) : "memory"));
}
// Whether it has, without waiting for it.
FLATLORA_DEVICE bool mbarrier_test(Shared barrier, uint32_t parity) {
  uint32_t done = 0;
  FLATLORA_SM90(
      asm volatile("{\n"
                   ".reg .pred done;\n"
                   "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                   "selp.u32 %0, 1, 0, done;\n"
                   "}" : "=r"(done) : "r"(barrier),
                   "r"(parity) : "memory"));
  return done != 0;
}

// Generic-proxy writes to shared memory before it are seen by asynchronous copies and wgmma after it.
FLATLORA_DEVICE void fence_proxy_async() {
  FLATLORA_SM90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"));
}

// The same of global memory, and on both sides of what another block hands over.
FLATLORA_DEVICE void fence_proxy_async_global() {
  FLATLORA_SM90(asm volatile("fence.proxy.async.global;" :: : "memory"));
}

using TensorMap = CUtensorMap;

// The box of `map` at element (column, row); out of bounds is zero. One thread; `to` at a multiple of 1024 bytes, where
// the swizzle repeats.
FLATLORA_DEVICE void tma_load(Shared to, const TensorMap* map, int column, int row, Shared barrier) {
  FLATLORA_SM90(asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory"));
}
// The same to this address of each block of the cluster whose bit is in `blocks`, completing on that block's `barrier`.
FLATLORA_DEVICE void tma_load_multicast(Shared to, const TensorMap* map, int column, int row, Shared barrier,
                                        uint16_t blocks) {
  FLATLORA_SM90(asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, "
      "%3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks) : "memory"));
}
// Shared memory of this block to the same address of block `rank` of the cluster, completing on the barrier that block
// has at `barrier`. One thread; multiples of 16 bytes.
FLATLORA_DEVICE void copy_to_block(int rank, Shared at, int bytes, Shared barrier) {
  FLATLORA_SM90(
      asm volatile("{\n"
                   ".reg .b32 to, barrier;\n"
                   "mapa.shared::cluster.u32 to, %0, %2;\n"
                   "mapa.shared::cluster.u32 barrier, %3, %2;\n"
                   "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [to], [%0], %1, "
                   "[barrier];\n"
                   "}" ::"r"(at),
                   "r"(bytes), "r"(rank), "r"(barrier) : "memory"));
}
// Four 8x8 matrices of 16-bit elements to shared memory; lane l gives the address of row l % 8 of matrix l / 8.
FLATLORA_DEVICE void stmatrix(Shared row, const uint32_t (&r)[4]) {
  FLATLORA_SM90(asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
                             "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
}
// Shared memory to the box of `map` at element (column, row) of a plane, but for what is out of bounds; a group of its
// own. One thread.
FLATLORA_DEVICE void tma_store(const TensorMap* map, int column, int row, int plane, Shared from) {
  FLATLORA_SM90(
      asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];\n"
                   "cp.async.bulk.commit_group;" ::"l"(map),
                   "r"(column), "r"(row), "r"(plane), "r"(from) : "memory"));
}
// Until shared memory has been read for all but `pending` of this thread's stores.
template <int pending>
FLATLORA_DEVICE void tma_store_wait_read() {
  FLATLORA_SM90(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory"));
}
// Until all but so many are done.
template <int pending>
FLATLORA_DEVICE void tma_store_wait() {
  FLATLORA_SM90(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory"));
}

// All threads of all blocks of the cluster.
FLATLORA_DEVICE void cluster_sync() {
  FLATLORA_SM90(
      asm volatile("barrier.cluster.arrive.release.aligned;\n"
                   "barrier.cluster.wait.acquire.aligned;" :: : "memory"));
}

// All warps of a warpgroup, once; kCount is a multiple of 8.
template <int kCount>
FLATLORA_DEVICE void registers_increase() {
  FLATLORA_SM90(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount)));
}
template <int kCount>
FLATLORA_DEVICE void registers_decrease() {
  FLATLORA_SM90(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount)));
}

// Before the first wgmma of a group: orders register and shared-memory accesses before it.
FLATLORA_DEVICE void wgmma_fence() { FLATLORA_SM90(asm volatile("wgmma.fence.sync.aligned;" :: : "memory")); }
FLATLORA_DEVICE void wgmma_commit() { FLATLORA_SM90(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory")); }
template <int pending>
FLATLORA_DEVICE void wgmma_wait() {
  FLATLORA_SM90(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"));
}
// Keeps the compiler from moving accumulators across this point. Around wgmma_fence and after wgmma_wait.
template <int n>
FLATLORA_DEVICE void wgmma_hold(float (&d)[n]) {
  FLATLORA_UNROLL
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define FLATLORA_D8(i)                                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FLATLORA_D32(i) FLATLORA_D8(i), FLATLORA_D8(i + 8), FLATLORA_D8(i + 16), FLATLORA_D8(i + 24)
#define FLATLORA_R32_0                                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FLATLORA_R32_1                                                                                             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// d += a b (or = a b where `accumulate` is 0) for a (64, 16) and b (16, 2 n) in shared memory, both described as PTX's
// "matrix descriptor"; `b` lies with its contraction contiguous, or kTransposed with its columns contiguous.
#define FLATLORA_WGMMA(columns, registers, outputs, list, a, b, c, t, ptx_type, type)                                  \
  template <int kTransposed>                                                                                           \
  FLATLORA_DEVICE void wgmma(float (&d)[registers], uint64_t a_tile, uint64_t b_tile, int accumulate, type) {          \
    FLATLORA_SM90(asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " c ", 0;\n"                                          \
                               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." ptx_type "." ptx_type " {" list \
                               "}, " a ", " b ", p, 1, 1, 0, " t ";\n}" : outputs : "l"(a_tile),                       \
                               "l"(b_tile), "r"(accumulate), "n"(kTransposed)));                                       \
  }
#define FLATLORA_OUTPUTS_32 FLATLORA_D32(0)
#define FLATLORA_OUTPUTS_64 FLATLORA_D32(0), FLATLORA_D32(32)
#define FLATLORA_PASS(...) __VA_ARGS__
FLATLORA_WGMMA(64, 32, FLATLORA_PASS(FLATLORA_D32(0)), FLATLORA_R32_0, "%32", "%33", "%34", "%35", "bf16", bf16)
FLATLORA_WGMMA(64, 32, FLATLORA_PASS(FLATLORA_D32(0)), FLATLORA_R32_0, "%32", "%33", "%34", "%35", "f16", f16)
FLATLORA_WGMMA(128, 64, FLATLORA_PASS(FLATLORA_OUTPUTS_64), FLATLORA_R32_0 ", " FLATLORA_R32_1, "%64", "%65", "%66",
               "%67", "bf16", bf16)
FLATLORA_WGMMA(128, 64, FLATLORA_PASS(FLATLORA_OUTPUTS_64), FLATLORA_R32_0 ", " FLATLORA_R32_1, "%64", "%65", "%66",
               "%67", "f16", f16)

}  // namespace gpu
}  // namespace flatlora
