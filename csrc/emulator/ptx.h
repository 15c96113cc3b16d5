// The twin of ../cuda/ptx.h for machines without a GPU. Include ../cuda/device.h, not this.
#pragma once

#include <cmath>

#include "machine.h"

namespace flatlora {
namespace gpu {

using emulated::current;
using emulated::Does;
using emulated::here;
using emulated::meet;
using emulated::record;
using emulated::Site;
using emulated::site_id;
using emulated::SiteId;
using emulated::skipped;

// --- Where a thread is ---

inline int thread() { return current->index; }
inline int warp() { return current->index / 32; }
inline int lane() { return current->lane; }
inline int64_t block() { return current->block->index; }
inline int64_t blocks() { return emulated::machine.how.blocks; }
inline int cluster_rank() { return current->block->rank; }

inline int uniform(int x, Site site = here()) {
  const SiteId id = site_id("uniform", site);
  meet(id, &x, [&](void** all) {
    for (int i = 0; i < 32; ++i)
      if (*static_cast<int*>(all[i]) != x) emulated::fail("lanes differ: %s", emulated::name(id).c_str());
  });
  return x;
}

// --- Memory ---

inline Shared shared_base() { return emulated::kSharedBase; }

template <class V>
V load_shared(Shared p, Site site = here()) {
  const SiteId id = site_id("load_shared", site);
  record(p, sizeof(V), Does::kRead, id);
  emulated::count_banks(p, sizeof(V), id);
  V v;
  memcpy(&v, current->block->at(p), sizeof v);
  return v;
}

template <class V>
void store_shared(Shared p, V v, Site site = here()) {
  const SiteId id = site_id("store_shared", site);
  record(p, sizeof(V), Does::kWrite, id);
  emulated::count_banks(p, sizeof(V), id);
  memcpy(current->block->at(p), &v, sizeof v);
}

template <class V>
V load_global(const void* p, Site site = here()) {
  emulated::check_global(p, sizeof(V), false, site_id("load_global", site));
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline Words<4> load_global_once(const void* p, Site site = here()) { return load_global<Words<4>>(p, site); }

template <class V>
void store_global(void* p, V v, Site site = here()) {
  emulated::check_global(p, sizeof(V), true, site_id("store_global", site));
  memcpy(p, &v, sizeof v);
}

// --- Between blocks that run at the same time: counters in global memory ---

inline void add_release(uint32_t* counter, uint32_t n, Site site = here()) {
  const SiteId id = site_id("add_release", site);
  if (!skipped(id)) emulated::add_release(counter, n, id);
}
// Not a synchronisation that could be missed: whoever needs one waits as well.
inline bool at_least(const uint32_t* counter, uint32_t least, Site site = here()) {
  return emulated::at_least(counter, least, false, site_id("at_least", site));
}
inline void wait_at_least(const uint32_t* counter, uint32_t least, Site site = here()) {
  const SiteId id = site_id("wait_at_least", site);
  if (!skipped(id)) emulated::at_least(counter, least, true, id);
}
inline void fence_gpu(Site site = here()) {
  if (!skipped(site_id("fence_gpu", site))) emulated::fence_gpu();
}

// --- Within a block ---

namespace emulated {

inline void sync_barrier(int number, int threads, SiteId id) {
  if (threads % 32 || threads < 32 || threads > machine.how.threads)
    fail("%s: a barrier of %d threads", name(id).c_str(), threads);
  meet(
      id, nullptr,
      [&](void**) {
        Warp& warp = *current->warp;
        Barrier& barrier = current->block->barriers[number];
        if (barrier.arrived && barrier.threads != threads)
          fail("barrier %d has %d threads: %s, and %d: %s", number, barrier.threads, name(barrier.site).c_str(),
               threads, name(id).c_str());
        if (number == 0) {
          if (barrier.arrived && barrier.site != id)
            fail("threads of one block diverge: %s, and %s", name(barrier.site).c_str(), name(id).c_str());
          if (current->block->done)
            fail("%d threads of block %lld have ended: %s", current->block->done, (long long)current->block->index,
                 name(id).c_str());
        }
        barrier.threads = threads;
        barrier.site = id;
        barrier.waiting.push_back(&warp);
        join_lanes(warp);
        barrier.clock.join(warp.seen);
        if ((barrier.arrived += 32) < threads) return;
        for (Warp* w : barrier.waiting) {
          w->seen = barrier.clock;
          for (Thread* t : w->lanes) wake(*t);
        }
        barrier = Barrier();
      },
      true);
}

}  // namespace emulated

inline void sync_threads(Site site = here()) {
  const SiteId id = site_id("sync_threads", site);
  if (!skipped(id)) emulated::sync_barrier(0, emulated::machine.how.threads, id);
}

inline void sync_named(int barrier, int threads, Site site = here()) {
  const SiteId id = site_id("sync_named", site);
  if (barrier < 1 || barrier > 15) emulated::fail("%s: barrier %d", emulated::name(id).c_str(), barrier);
  if (!skipped(id)) emulated::sync_barrier(barrier, threads, id);
}

inline void sync_warp(Site site = here()) {
  const SiteId id = site_id("sync_warp", site);
  if (!skipped(id)) meet(id, nullptr, [](void**) { emulated::join_lanes(*current->warp); });
}

namespace emulated {

// What lane `from` has.
template <class V>
V shuffle(V x, int from, SiteId id) {
  struct Argument {
    V x, result;
    int from;
  } mine{x, x, from};
  meet(id, &mine, [](void** all) {
    for (int i = 0; i < 32; ++i) {
      Argument& a = *static_cast<Argument*>(all[i]);
      a.result = static_cast<Argument*>(all[a.from & 31])->x;
    }
  });
  return mine.result;
}

}  // namespace emulated

template <class V>
V shuffle_xor(V x, int mask, Site site = here()) {
  return emulated::shuffle(x, current->lane ^ mask, site_id("shuffle_xor", site));
}
inline float shuffle(float x, int lane, Site site = here()) {
  return emulated::shuffle(x, lane, site_id("shuffle", site));
}

inline uint32_t vote(bool x, Site site = here()) {
  struct Argument {
    bool x;
    uint32_t result;
  } mine{x, 0};
  meet(site_id("vote", site), &mine, [](void** all) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= uint32_t(static_cast<Argument*>(all[i])->x) << i;
    for (int i = 0; i < 32; ++i) static_cast<Argument*>(all[i])->result = bits;
  });
  return mine.result;
}

// --- Arithmetic ---

inline uint32_t xor_masked(uint32_t a, uint32_t b, uint32_t mask) { return a ^ (b & mask); }
inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

inline uint32_t rotate_right(uint32_t x, int bits) { return x >> (bits & 31) | x << (-bits & 31); }
inline uint32_t reverse_bits(uint32_t x) {
  uint32_t y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline int count_bits(uint32_t x) { return __builtin_popcount(x); }

namespace emulated {

inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

inline uint16_t to_bf16(float x) {
  uint32_t bits = scalar::as_int(x);
  return std::isnan(x) ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// Of the exact x + rest, with |rest| below what x holds: what a conversion cuts off is kept in the last bit, so that
// the next one rounds as if it had seen the whole.
inline uint16_t to_bf16(double x, double rest) {
  float cut = float(x);
  const double left = std::isfinite(cut) ? (x - double(cut)) + rest : (std::isfinite(x) ? -x : 0.0);
  if (left != 0.0) {
    if (std::isinf(cut) || (left < 0) == (x > 0)) cut = std::nextafter(cut, 0.0f);
    cut = scalar::as_float(scalar::as_int(cut) | 1);
  }
  return to_bf16(cut);
}
inline float from_bf16(uint16_t bits) { return scalar::as_float(uint32_t(bits) << 16); }

inline uint16_t to_f16(float x) {
  const uint16_t sign = uint16_t(scalar::as_int(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  // A sum with 2^e rounds at the last place that is kept: 2^-24 for subnormals, else 2^-10 of the leading one.
  const int exponent = std::max(std::ilogb(size), -14);
  if (size == 0) return sign;
  const float scaled = std::nearbyint(std::ldexp(size, 10 - exponent));  // 0 ... 2048
  return sign | uint16_t((exponent + 14) * 1024 + int(scaled));
}
inline float from_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                     : exponent     ? std::ldexp(float(mantissa + 1024), exponent - 25)
                                    : std::ldexp(float(mantissa), -24);
  return bits & 0x8000 ? -size : size;
}
inline const float* f16_table() {
  static const std::vector<float> table = [] {
    std::vector<float> all(65536);
    for (int i = 0; i < 65536; ++i) all[i] = from_f16(uint16_t(i));
    return all;
  }();
  return table.data();
}

}  // namespace emulated

inline float log2_approx(float x) { return std::log2(emulated::flush(x)); }
inline float sqrt_approx(float x) { return emulated::flush(std::sqrt(emulated::flush(x))); }
inline float sin_approx(float x) { return emulated::flush(std::sin(emulated::flush(x))); }
inline float cos_approx(float x) { return emulated::flush(std::cos(emulated::flush(x))); }

inline uint32_t pack_bf16(float low, float high) {
  return emulated::to_bf16(low) | uint32_t(emulated::to_bf16(high)) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return emulated::to_f16(low) | uint32_t(emulated::to_f16(high)) << 16;
}
namespace emulated {

inline uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c) {
  const double product = double(from_bf16(a)) * from_bf16(b), addend = from_bf16(c), sum = product + addend;
  if (!std::isfinite(sum)) return to_bf16(float(sum));
  const double part = sum - product;
  return to_bf16(sum, (product - (sum - part)) + (addend - part));
}

}  // namespace emulated

inline uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
  const uint32_t low = emulated::fma_bf16(uint16_t(a), uint16_t(b), uint16_t(c));
  return low | uint32_t(emulated::fma_bf16(uint16_t(a >> 16), uint16_t(b >> 16), uint16_t(c >> 16))) << 16;
}
inline float f16_to_float(uint16_t bits) { return emulated::f16_table()[bits]; }
inline uint32_t to_tf32(float x) {
  const uint32_t bits = scalar::as_int(x);
  return std::isfinite(x) ? (bits + 0x1000) & ~0x1fffu : bits;
}

// --- sm_80: asynchronous copies and warp-wide matrix products ---

namespace emulated {

inline void land(Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  uint8_t* to = current->block->at(copy.to);
  memcpy(to, copy.from, size_t(copy.valid));
  memset(to + copy.valid, 0, size_t(copy.bytes - copy.valid));
}

}  // namespace emulated

// Lands when cp_async_wait demands it, or at once where the schedule's seed says so.
template <int kBytes>
void cp_async(Shared to, const void* from, int valid = kBytes, Site site = here()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const SiteId id = site_id("cp_async", site);
  if (valid < 0 || valid > kBytes) emulated::fail("%s: %d of %d bytes", emulated::name(id).c_str(), valid, kBytes);
  if (reinterpret_cast<uintptr_t>(from) % kBytes)
    emulated::fail("%s: global address %p is not aligned to %d bytes", emulated::name(id).c_str(), from, kBytes);
  for (int i = 0; i < valid; i += 2)
    emulated::check_global(static_cast<const uint8_t*>(from) + i, std::min(2, valid - i), false, id);
  emulated::Thread& t = *current;
  const uint16_t copies = uint16_t(t.actor + emulated::machine.how.threads * emulated::machine.group());
  record(t, *t.block, to, kBytes, Does::kWrite, id, copies, t.committed + 1);
  emulated::count_banks(to, kBytes, id);
  emulated::poison(*t.block, to, kBytes);
  t.copies.push_back({to, from, kBytes, valid, t.committed + 1, false});
  if (emulated::machine.seed % 4 > 1 && emulated::random(2)) emulated::land(t.copies.back());
}

inline void cp_async_commit(Site site = here()) {
  if (!skipped(site_id("cp_async_commit", site))) ++current->committed;
}

template <int pending>
void cp_async_wait(Site site = here()) {
  emulated::Thread& t = *current;
  const uint32_t left = pending + skipped(site_id("cp_async_wait", site));
  if (t.committed <= t.landed + left) return;
  t.landed = t.committed - left;
  size_t kept = 0;
  for (emulated::Copy& copy : t.copies)
    if (copy.group <= t.landed)
      emulated::land(copy);
    else
      t.copies[kept++] = copy;
  t.copies.resize(kept);
}

namespace emulated {

struct Rows {
  uint32_t* result;
  Shared row;
};

// Thread `lane` holds elements (lane / 4, lane % 4 * 2 + half) of each matrix; transposed, (that, this).
inline void load_matrices(void** all, bool transpose, SiteId id) {
  uint16_t element[4][8][8];
  for (int i = 0; i < 4; ++i) {
    Shared phase[8];
    for (int row = 0; row < 8; ++row) {
      Thread& reader = current->block->threads[current->index / 32 * 32 + i * 8 + row];
      const Shared p = phase[row] = static_cast<Rows*>(all[i * 8 + row])->row;
      record(reader, *current->block, p, 16, Does::kRead, id, reader.actor, reader.epoch);
      memcpy(element[i][row], current->block->at(p), 16);
    }
    if (machine.checks) count_phase(phase, 8, 16, id);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int a = lane / 4, b = lane % 4 * 2;
      const uint16_t low = transpose ? element[i][b][a] : element[i][a][b];
      const uint16_t high = transpose ? element[i][b + 1][a] : element[i][a][b + 1];
      static_cast<Rows*>(all[lane])->result[i] = low | uint32_t(high) << 16;
    }
}

struct StoredRows {
  const uint32_t* values;
  Shared row;
};
// The other way, of fragments that are not transposed.
inline void store_matrices(void** all, SiteId id) {
  for (int i = 0; i < 4; ++i) {
    Shared phase[8];
    for (int row = 0; row < 8; ++row) {
      Thread& writer = current->block->threads[current->index / 32 * 32 + i * 8 + row];
      const Shared p = phase[row] = static_cast<StoredRows*>(all[i * 8 + row])->row;
      record(writer, *current->block, p, 16, Does::kWrite, id, writer.actor, writer.epoch);
      for (int b = 0; b < 4; ++b)
        memcpy(current->block->at(p) + 4 * b, &static_cast<StoredRows*>(all[row * 4 + b])->values[i], 4);
    }
    if (machine.checks) count_phase(phase, 8, 16, id);
  }
}

}  // namespace emulated

inline void ldmatrix(uint32_t (&r)[4], Shared row, Site site = here()) {
  const SiteId id = site_id("ldmatrix", site);
  emulated::Rows mine{r, row};
  meet(id, &mine, [id](void** all) { emulated::load_matrices(all, false, id); });
}
inline void ldmatrix_trans(uint32_t (&r)[4], Shared row, Site site = here()) {
  const SiteId id = site_id("ldmatrix_trans", site);
  emulated::Rows mine{r, row};
  meet(id, &mine, [id](void** all) { emulated::load_matrices(all, true, id); });
}

namespace emulated {

struct Position {
  int row, column;
};
// Where element `e` of a lane's fragment lies in the (16, k) a, the (k, 8) b and the (16, 8) d; two 16-bit elements
// share a register (k = 16), or one tf32 fills it (k = 8).
constexpr Position mma_a(int lane, int e) { return {lane / 4 + e / 2 % 2 * 8, lane % 4 * 2 + e % 2 + e / 4 * 8}; }
constexpr Position mma_b(int lane, int e) { return {lane % 4 * 2 + e % 2 + e / 2 * 8, lane / 4}; }
constexpr Position mma_d(int lane, int e) { return {lane / 4 + e / 2 * 8, lane % 4 * 2 + e % 2}; }
constexpr Position mma_a_tf32(int lane, int e) { return {lane / 4 + e % 2 * 8, lane % 4 + e / 2 * 4}; }
constexpr Position mma_b_tf32(int lane, int e) { return {lane % 4 + e * 4, lane / 4}; }

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

// Products are exact, and so, nearly, is the sum of one instruction; it is rounded once.
template <int k>
void multiply(void** all, const double (&a)[16][k], const double (&b)[k][8]) {
  double d[16][8] = {};
  for (int i = 0; i < 16; ++i)
    for (int l = 0; l < k; ++l)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][l] * b[l][j];
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) {
      float& to = static_cast<Fragments*>(all[lane])->d[e];
      const Position p = mma_d(lane, e);
      to = float(to + d[p.row][p.column]);
    }
}

template <class Convert>
void multiply_16(void** all, Convert convert) {
  double a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& f = *static_cast<Fragments*>(all[lane]);
    for (int e = 0; e < 8; ++e) {
      const Position p = mma_a(lane, e);
      a[p.row][p.column] = convert(uint16_t(f.a[e / 2] >> e % 2 * 16));
    }
    for (int e = 0; e < 4; ++e) {
      const Position p = mma_b(lane, e);
      b[p.row][p.column] = convert(uint16_t(f.b[e / 2] >> e % 2 * 16));
    }
  }
  multiply<16>(all, a, b);
}

}  // namespace emulated

inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16, Site site = here()) {
  emulated::Fragments mine{d, a, b};
  meet(site_id("mma", site), &mine,
       [](void** all) { emulated::multiply_16(all, [](uint16_t bits) { return emulated::from_bf16(bits); }); });
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16, Site site = here()) {
  emulated::Fragments mine{d, a, b};
  meet(site_id("mma", site), &mine,
       [](void** all) { emulated::multiply_16(all, [](uint16_t bits) { return f16_to_float(bits); }); });
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = here()) {
  emulated::Fragments mine{d, a, b};
  meet(site_id("mma_tf32", site), &mine, [](void** all) {
    double a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const emulated::Fragments& f = *static_cast<emulated::Fragments*>(all[lane]);
      for (int e = 0; e < 4; ++e) {
        const emulated::Position p = emulated::mma_a_tf32(lane, e);
        a[p.row][p.column] = scalar::as_float(f.a[e] & ~0x1fffu);
      }
      for (int e = 0; e < 2; ++e) {
        const emulated::Position p = emulated::mma_b_tf32(lane, e);
        b[p.row][p.column] = scalar::as_float(f.b[e] & ~0x1fffu);
      }
    }
    emulated::multiply<8>(all, a, b);
  });
}

}  // namespace gpu
}  // namespace flatlora

#include "sm90.h"
