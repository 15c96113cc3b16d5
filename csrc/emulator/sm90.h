// The twin of what ../cuda/ptx.h and ../cuda/launch.h have for sm_90a. The rules are those of the PTX manual; where it
// leaves a choice, the emulator takes the stricter reading.
#pragma once

#include "machine.h"

namespace flatlora {
namespace gpu {

struct alignas(64) TensorMap {
  const uint8_t* data;
  int64_t rows, columns, row_bytes, box_rows, planes;
};

namespace emulated {

void mbarrier_init(Shared barrier, int arrivals, SiteId site);
void fence_mbarrier_init();
void mbarrier_arrive(Shared barrier, int rank, int64_t bytes, SiteId site);
void mbarrier_wait(Shared barrier, uint32_t parity, SiteId site);
bool mbarrier_test(Shared barrier, uint32_t parity, SiteId site);
void tma_load(Shared to, const TensorMap& map, int column, int row, Shared barrier, uint32_t blocks, SiteId site);
void copy_to_block(int rank, Shared at, int bytes, Shared barrier, SiteId site);
void tma_store(const TensorMap& map, int column, int row, int plane, Shared from, SiteId site);
void tma_store_wait(uint32_t pending, SiteId site);
void cluster_sync(SiteId site);
void set_registers(int count, bool increase, SiteId site);
void wgmma_fence(SiteId site);
void wgmma_commit(SiteId site);
void wgmma_wait(uint32_t pending, SiteId site);
struct Operands {
  float* d;
  uint64_t a, b;
  int columns, accumulate, transposed;
  bool is_bf16;
};
void wgmma(Operands mine, SiteId site);

}  // namespace emulated

inline void mbarrier_init(Shared barrier, int arrivals, Site site = here()) {
  const SiteId id = site_id("mbarrier_init", site);
  if (!skipped(id)) emulated::mbarrier_init(barrier, arrivals, id);
}
inline void fence_mbarrier_init(Site site = here()) {
  if (!skipped(site_id("fence_mbarrier_init", site))) emulated::fence_mbarrier_init();
}
inline void mbarrier_arrive(Shared barrier, Site site = here()) {
  const SiteId id = site_id("mbarrier_arrive", site);
  if (!skipped(id)) emulated::mbarrier_arrive(barrier, cluster_rank(), 0, id);
}
inline void mbarrier_arrive_expect(Shared barrier, int bytes, Site site = here()) {
  const SiteId id = site_id("mbarrier_arrive_expect", site);
  if (!skipped(id)) emulated::mbarrier_arrive(barrier, cluster_rank(), bytes, id);
}
inline void mbarrier_arrive_cluster(Shared barrier, int rank, Site site = here()) {
  const SiteId id = site_id("mbarrier_arrive_cluster", site);
  if (!skipped(id)) emulated::mbarrier_arrive(barrier, rank, 0, id);
}
inline void mbarrier_wait(Shared barrier, uint32_t parity, Site site = here()) {
  const SiteId id = site_id("mbarrier_wait", site);
  if (!skipped(id)) emulated::mbarrier_wait(barrier, parity, id);
}
// Not a synchronisation that could be missed: whoever needs one waits as well.
inline bool mbarrier_test(Shared barrier, uint32_t parity, Site site = here()) {
  return emulated::mbarrier_test(barrier, parity, site_id("mbarrier_test", site));
}

inline void fence_proxy_async(Site site = here()) {
  if (!skipped(site_id("fence_proxy_async", site))) emulated::fence_proxies(*current);
}
inline void fence_proxy_async_global(Site site = here()) {
  if (!skipped(site_id("fence_proxy_async_global", site))) emulated::fence_proxies_global(*current);
}
inline void tma_load(Shared to, const TensorMap* map, int column, int row, Shared barrier, Site site = here()) {
  emulated::tma_load(to, *map, column, row, barrier, 1u << cluster_rank(), site_id("tma_load", site));
}
inline void tma_load_multicast(Shared to, const TensorMap* map, int column, int row, Shared barrier, uint16_t blocks,
                               Site site = here()) {
  emulated::tma_load(to, *map, column, row, barrier, blocks, site_id("tma_load_multicast", site));
}
inline void copy_to_block(int rank, Shared at, int bytes, Shared barrier, Site site = here()) {
  emulated::copy_to_block(rank, at, bytes, barrier, site_id("copy_to_block", site));
}
inline void stmatrix(Shared row, const uint32_t (&r)[4], Site site = here()) {
  const SiteId id = site_id("stmatrix", site);
  if (emulated::machine.architecture < 90) emulated::fail("%s needs sm_90", emulated::name(id).c_str());
  emulated::StoredRows mine{r, row};
  meet(id, &mine, [id](void** all) { emulated::store_matrices(all, id); });
}
inline void tma_store(const TensorMap* map, int column, int row, int plane, Shared from, Site site = here()) {
  emulated::tma_store(*map, column, row, plane, from, site_id("tma_store", site));
}
template <int pending>
void tma_store_wait_read(Site site = here()) {
  const SiteId id = site_id("tma_store_wait_read", site);
  if (!skipped(id)) emulated::tma_store_wait(pending, id);
}
template <int pending>
void tma_store_wait(Site site = here()) {
  const SiteId id = site_id("tma_store_wait", site);
  if (!skipped(id)) emulated::tma_store_wait(pending, id);
}
inline void cluster_sync(Site site = here()) {
  const SiteId id = site_id("cluster_sync", site);
  if (!skipped(id)) emulated::cluster_sync(id);
}

template <int kCount>
void registers_increase(Site site = here()) {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0);
  emulated::set_registers(kCount, true, site_id("registers_increase", site));
}
template <int kCount>
void registers_decrease(Site site = here()) {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0);
  emulated::set_registers(kCount, false, site_id("registers_decrease", site));
}

inline void wgmma_fence(Site site = here()) {
  const SiteId id = site_id("wgmma_fence", site);
  if (!skipped(id)) emulated::wgmma_fence(id);
}
inline void wgmma_commit(Site site = here()) {
  const SiteId id = site_id("wgmma_commit", site);
  if (!skipped(id)) emulated::wgmma_commit(id);
}
template <int pending>
void wgmma_wait(Site site = here()) {
  const SiteId id = site_id("wgmma_wait", site);
  emulated::wgmma_wait(pending + skipped(id), id);
}
template <int n>
void wgmma_hold(float (&)[n]) {}

template <int kTransposed, int n>
void wgmma(float (&d)[n], uint64_t a, uint64_t b, int accumulate, bf16, Site site = here()) {
  static_assert(n == 32 || n == 64);
  emulated::wgmma({d, a, b, 2 * n, accumulate, kTransposed, true}, site_id("wgmma", site));
}
template <int kTransposed, int n>
void wgmma(float (&d)[n], uint64_t a, uint64_t b, int accumulate, f16, Site site = here()) {
  static_assert(n == 32 || n == 64);
  emulated::wgmma({d, a, b, 2 * n, accumulate, kTransposed, false}, site_id("wgmma", site));
}

// Refuses what cuTensorMapEncodeTiled refuses.
inline Error encode_tensor_maps(TensorMap* map, const void* data, int planes, int64_t rows, int64_t columns,
                                int64_t row_bytes, int box_rows, bool) {
  constexpr int64_t kSizes = int64_t(1) << 32, kStrides = int64_t(1) << 40;
  if (reinterpret_cast<uintptr_t>(map) % 64 || reinterpret_cast<uintptr_t>(data) % 16 || rows < 1 || rows > kSizes ||
      columns < 1 || columns > kSizes || row_bytes % 16 || row_bytes < 2 * columns || row_bytes >= kStrides ||
      box_rows < 1 || box_rows > 256)
    return 1;
  *map = {static_cast<const uint8_t*>(data), rows, columns, row_bytes, box_rows, planes};
  return 0;
}
inline Error encode_tensor_map(TensorMap* map, const void* data, int64_t rows, int64_t columns, int64_t row_bytes,
                               int box_rows, bool is_bf16) {
  return encode_tensor_maps(map, data, 0, rows, columns, row_bytes, box_rows, is_bf16);
}

}  // namespace gpu
}  // namespace flatlora
