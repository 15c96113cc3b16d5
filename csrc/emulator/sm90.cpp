// What the instructions of sm90.h do.
#include <algorithm>
#include <deque>
#include <map>

#include "../cuda/device.h"

namespace flatlora {
namespace gpu {
namespace emulated {
namespace {

// --- State of the running cluster ---

struct Mbarrier {
  Block* block;
  Shared address;
  // Asynchronous copies that complete on it are accesses of this actor, numbered; whoever waits for a phase has seen
  // those that had landed.
  uint16_t actor;
  uint16_t by;  // whoever initialised it
  uint32_t initialised, fenced = 0;  // when, in that actor's epochs
  int64_t expected, pending, bytes = 0;
  uint32_t phase = 0, issued = 0, landed = 0;
  std::vector<bool> is_landed;
  Clock arriving;
  std::shared_ptr<const Clock> done;  // at the end of the last phase
  int waiting = 0;
};

struct Transfer {
  Mbarrier* barrier;
  uint32_t number;
  SiteId site;
  Block* to_block;
  Shared to;
  int bytes;
  // From global memory, or from another block.
  TensorMap map;
  int column, row;
  Block* from_block;
};

// The part of an accumulator that one warp holds.
struct Accumulator {
  float* registers[32];
  std::vector<float> values;  // (16, columns)
  uint32_t group;  // the last that adds to it
};

struct Product {
  Operands operands;
  SiteId site;
  uint32_t group;
  Accumulator* d[4];
};

struct Warpgroup {
  Block* block;
  int first;  // warp
  uint16_t actor;  // reads shared memory; its epochs are groups
  std::deque<Product> products;
  size_t finished = 0;
  struct {
    size_t issued = 0;
    uint32_t committed = 0, waited = 0;
    bool fenced = false;
    std::map<float*, Accumulator> accumulators;
    std::shared_ptr<const Clock> done;
  } warps[4];
};

// A thread's stores from shared memory; its epochs are groups.
struct Stores {
  uint16_t actor;
  uint32_t issued = 0, read = 0;
};

struct Cluster {
  std::map<std::pair<int, Shared>, Mbarrier> barriers;
  std::map<const Thread*, Stores> stores;
  std::vector<Transfer> transfers;
  std::map<std::pair<int, int>, Warpgroup> warpgroups;  // by rank and first warp
  // Accesses from outside, by block and actor, that the block must outlive.
  std::map<std::pair<Block*, uint16_t>, std::pair<uint32_t, SiteId>> visits;
  Clock clock;
  std::vector<Warp*> waiting;
  struct Registers {
    int free = 0, waiting = 0;
    std::vector<int> held;  // by warp
    std::vector<bool> changed;
  };
  std::vector<Registers> registers;  // by block
  bool checked = false;

  Cluster();
};

Cluster& cluster() { return *static_cast<Cluster*>(machine.extra.get()); }

void start(SiteId site) {
  if (machine.architecture < 90) fail("%s needs sm_90a", name(site).c_str());
  slot<Cluster>(machine.extra);
}

std::string block_name(const Block& block) { return "block " + std::to_string(block.index); }

// --- mbarrier ---

Mbarrier& find(Block& block, Shared p, SiteId site) {
  start(site);
  const auto found = cluster().barriers.find({block.rank, p});
  if (found == cluster().barriers.end())
    fail("%s: %s, no barrier was initialised at %lld", name(*current).c_str(), name(site).c_str(),
         (long long)p - kSharedBase);
  return found->second;
}

// `widely`: by the asynchronous proxy, or from another block.
void check_visible(const Mbarrier& b, bool widely, SiteId site) {
  if (!has_seen(*current, b.by, b.initialised))
    complain("%s: %s, a barrier whose initialisation it has not seen", name(*current).c_str(), name(site).c_str());
  else if (widely && (b.fenced == 0 || !has_seen(*current, b.by, b.fenced)))
    complain("%s: %s, a barrier whose initialisation no fence_mbarrier_init has made visible", name(*current).c_str(),
             name(site).c_str());
}

void try_to_complete(Mbarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.expected;
  if (b.arriving.epochs.size() <= b.actor) b.arriving.epochs.resize(b.actor + 1u);
  b.arriving.epochs[b.actor] = b.landed;
  b.done = std::make_shared<Clock>(b.arriving);
}

void visit(Block& block, uint16_t actor, uint32_t epoch, SiteId site) {
  cluster().visits[{&block, actor}] = {epoch, site};
}

void check_alive(const Block& block, SiteId site) {
  if (block.done == machine.how.threads)
    fail("%s: %s, %s has ended", name(*current).c_str(), name(site).c_str(), block_name(block).c_str());
}

Block& block_of(int rank, SiteId site) {
  if (rank < 0 || rank >= machine.group())
    fail("%s: %s, block %d of a cluster of %d", name(*current).c_str(), name(site).c_str(), rank, machine.group());
  return machine.blocks[size_t(rank)];
}

// --- Asynchronous copies ---

// Of a box at (column, row), what lies within the matrix: calls f(byte of the matrix, line and column of the box,
// bytes).
template <class F>
void each_line(const TensorMap& map, int column, int row, F f) {
  const int64_t first = std::max(column, 0), end = std::min(int64_t(column) + 64, map.columns);
  if (first >= end) return;
  for (int64_t m = std::max(row, 0); m < std::min(row + map.box_rows, map.rows); ++m)
    f(m * map.row_bytes + first * 2, int(m - row), int(first - column), (end - first) * 2);
}
// Where an element of a box lies in shared memory.
int swizzled(int line, int column) { return line * 128 + (column / 8 ^ line % 8) * 16 + column % 8 * 2; }

void land(const Transfer& transfer) {
  Mbarrier& b = *transfer.barrier;
  uint8_t* to = transfer.to_block->at(transfer.to);
  if (transfer.from_block) {
    memcpy(to, transfer.from_block->at(transfer.to), size_t(transfer.bytes));
  } else {
    memset(to, 0, size_t(transfer.bytes));
    each_line(transfer.map, transfer.column, transfer.row, [&](int64_t at, int line, int column, int64_t bytes) {
      for (int i = 0; i < int(bytes) / 2; ++i)
        memcpy(to + swizzled(line, column + i), transfer.map.data + at + 2 * i, 2);
    });
  }
  b.is_landed[transfer.number - 1] = true;
  while (b.landed < b.issued && b.is_landed[b.landed]) ++b.landed;
  b.bytes -= transfer.bytes;
  try_to_complete(b);
}

void land_any() {
  std::vector<Transfer>& all = cluster().transfers;
  const size_t i = random(uint32_t(all.size()));
  const Transfer transfer = all[i];
  all[i] = all.back();
  all.pop_back();
  land(transfer);
}

void issue(Transfer&& transfer) {
  Mbarrier& b = *transfer.barrier;
  const SiteId site = transfer.site;
  check_visible(b, true, site);
  for (const auto& [where, other] : cluster().barriers)
    if (where.first == transfer.to_block->rank && where.second + 8 > transfer.to &&
        where.second < transfer.to + uint32_t(transfer.bytes))
      fail("%s: %s overwrites a barrier", name(*current).c_str(), name(site).c_str());
  transfer.number = ++b.issued;
  b.is_landed.push_back(false);
  if (transfer.from_block) {
    record(*current, *transfer.from_block, transfer.to, transfer.bytes, Does::kRead, site, b.actor, b.issued, true);
    visit(*transfer.from_block, b.actor, b.issued, site);
  }
  record(*current, *transfer.to_block, transfer.to, transfer.bytes, Does::kWrite, site, b.actor, b.issued, true);
  visit(*transfer.to_block, b.actor, b.issued, site);
  poison(*transfer.to_block, transfer.to, transfer.bytes);
  cluster().transfers.push_back(std::move(transfer));
}

// --- wgmma ---

Warpgroup& warpgroup(SiteId site) {
  start(site);
  const int first = current->index / 128 * 4;
  if (first + 4 > machine.how.threads / 32) fail("%s: a warpgroup has four warps", name(site).c_str());
  Warpgroup& g = cluster().warpgroups[{current->block->rank, first}];
  if (g.block == nullptr) {
    g.block = current->block;
    g.first = first;
    g.actor = add_actor();
  }
  return g;
}

struct Matrix {
  Shared start;
  uint32_t leading, stride;  // bytes
};

// The fields of the manual's "matrix descriptor". The 128-byte swizzle is the only layout that kernels use here.
Matrix decode(uint64_t bits, SiteId site) {
  const auto field = [bits](int first) { return uint32_t(bits >> first & 0x3fff) << 4; };
  const Matrix m{field(0), field(16), field(32)};
  if (bits >> 62 != 1) fail("%s: a descriptor with swizzle mode %d", name(site).c_str(), int(bits >> 62));
  if (bits >> 49 & 7 || m.start % 1024 >= 128)
    fail("%s: a matrix that begins within the swizzle's pattern of 8 rows", name(site).c_str());
  if (bits & ~(0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62))
    fail("%s: descriptor %016llx", name(site).c_str(), (unsigned long long)bits);
  return m;
}

// Where 16 bytes of a matrix lie. Contiguous in k: 8 rows of 128 bytes repeat every `stride`; the k of one
// instruction stay within the 128 bytes. Else: 64 rows (or columns) of 8 k repeat every `leading` along the rows and
// every `stride` along k.
Shared chunk_k_major(const Matrix& m, int row, int k) { return m.start + row / 8 * m.stride + row % 8 * 128 + k * 2; }
Shared chunk_mn_major(const Matrix& m, int row, int k) {
  return m.start + row / 64 * m.leading + k / 8 * m.stride + k % 8 * 128 + row % 64 * 2;
}
Shared swizzle(Shared p) { return p ^ (p >> 7 & 7) << 4; }

// Calls f(row, k, address) for each 8 elements.
template <class F>
void each_chunk(const Matrix& m, bool transposed, int rows, F f) {
  if (transposed) {
    for (int k = 0; k < 16; ++k)
      for (int row = 0; row < rows; row += 8) f(row, k, swizzle(chunk_mn_major(m, row, k)));
  } else {
    for (int row = 0; row < rows; ++row)
      for (int k = 0; k < 16; k += 8) f(row, k, swizzle(chunk_k_major(m, row, k)));
  }
}

// Register i of lane l of a warp holds this place of the warp's 16 rows.
constexpr Position wgmma_d(int lane, int i) { return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8}; }

void multiply_next(Warpgroup& g) {
  const Product& p = g.products[g.finished++];
  const Operands& o = p.operands;
  static double a[64][16], b[16][128];
  const auto convert = [&](Shared at, int i) {
    uint16_t bits;
    memcpy(&bits, g.block->at(at) + 2 * i, 2);
    return o.is_bf16 ? from_bf16(bits) : f16_table()[bits];
  };
  each_chunk(decode(o.a, p.site), false, 64, [&](int row, int k, Shared at) {
    for (int i = 0; i < 8; ++i) a[row][k + i] = convert(at, i);
  });
  each_chunk(decode(o.b, p.site), o.transposed, o.columns, [&](int row, int k, Shared at) {
    for (int i = 0; i < 8; ++i) (o.transposed ? b[k][row + i] : b[k + i][row]) = convert(at, i);
  });
  for (int row = 0; row < 64; ++row) {
    double sums[128] = {};
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 128; ++n) sums[n] += a[row][k] * b[k][n];
    float* d = &p.d[row / 16]->values[size_t(row % 16 * o.columns)];
    for (int n = 0; n < o.columns; ++n) d[n] = float((o.accumulate ? d[n] : 0.0f) + sums[n]);
  }
}

size_t issued_by_all(const Warpgroup& g) {
  size_t least = g.warps[0].issued;
  for (const auto& w : g.warps) least = std::min(least, w.issued);
  return least;
}

constexpr uint32_t kInFlight = 0x7fbadbad;  // a NaN

void issue_product(Warpgroup& g, int w, void** lanes, SiteId site) {
  auto& warp = g.warps[w];
  const Operands& o = *static_cast<Operands*>(lanes[0]);
  const auto same = [](const Operands& x, const Operands& y) {
    return x.a == y.a && x.b == y.b && x.columns == y.columns && x.transposed == y.transposed &&
           !x.accumulate == !y.accumulate && x.is_bf16 == y.is_bf16;
  };
  for (int lane = 1; lane < 32; ++lane)
    if (!same(o, *static_cast<Operands*>(lanes[lane]))) fail("lanes differ: %s", name(site).c_str());
  const uint32_t group = warp.committed + 1;
  if (warp.issued == g.products.size()) g.products.push_back({o, site, group, {}});
  Product& p = g.products[warp.issued++];
  if (!same(o, p.operands) || p.site != site || p.group != group)
    fail("warps of a warpgroup differ: %s, and %s", name(p.site).c_str(), name(site).c_str());
  if (!warp.fenced) complain("%s: %s, no wgmma_fence since the last group", name(*current).c_str(), name(site).c_str());

  const bool fresh = !warp.accumulators.count(o.d);
  Accumulator& d = warp.accumulators[o.d];
  d.group = group;
  p.d[w] = &d;
  if (fresh) d.values.resize(size_t(16 * o.columns));
  for (int lane = 0; lane < 32; ++lane) {
    d.registers[lane] = static_cast<Operands*>(lanes[lane])->d;
    for (int i = 0; i < o.columns / 2; ++i) {
      float& r = d.registers[lane][i];
      const Position at = wgmma_d(lane, i);
      if (fresh)
        d.values[size_t(at.row * o.columns + at.column)] = r;
      else if (scalar::as_int(r) != kInFlight)
        fail("%s: %s, its accumulator was written while in flight", name(*current).c_str(), name(site).c_str());
      r = scalar::as_float(kInFlight);
    }
  }

  // Each warp reads its rows of a. All read b; here, each checks a quarter.
  int turn = 0;
  const auto check = [&](Shared at) {
    Thread& viewer = g.block->threads[size_t((g.first + w) * 32 + turn++ * 7 % 32)];
    record(viewer, *g.block, at, 16, Does::kRead, site, g.actor, group, true);
  };
  each_chunk(decode(o.a, site), false, 64, [&](int row, int, Shared at) {
    if (row / 16 == w) check(at);
  });
  int i = 0;
  each_chunk(decode(o.b, site), o.transposed, o.columns, [&](int, int, Shared at) {
    if (i++ / 2 % 4 == w) check(at);
  });
}

// --- What happens meanwhile ---

void check_end() {
  for (const Block& block : machine.blocks)
    if (block.done < machine.how.threads) return;
  cluster().checked = true;
  for (const auto& [where, what] : cluster().visits) {
    const Block& block = *where.first;
    bool seen = false;
    for (const Thread& t : block.threads) seen = seen || has_seen(t, where.second, what.first);
    if (!seen)
      complain("%s may end before %s reaches its memory", block_name(block).c_str(), name(what.second).c_str());
  }
  for (const auto& [thread, s] : cluster().stores)
    if (s.read < s.issued) complain("%s ended with tma_store under way", name(*thread).c_str());
  for (const auto& [where, g] : cluster().warpgroups)
    for (const auto& warp : g.warps) {
      if (warp.issued < g.products.size())
        complain("a warp of %s never came to %s", block_name(*g.block).c_str(),
                 name(g.products[warp.issued].site).c_str());
      if (!warp.accumulators.empty()) complain("%s ended with wgmma under way", block_name(*g.block).c_str());
    }
}

bool advance(bool idle) {
  Cluster& c = cluster();
  if (!c.checked) check_end();
  if (idle && c.transfers.empty()) {
    for (const auto& [where, b] : c.barriers)
      if (b.waiting)
        complain("%s waits at the barrier at %lld, phase %u: %lld of %lld arrivals and %lld bytes are missing",
                 block_name(*b.block).c_str(), (long long)b.address - kSharedBase, b.phase, (long long)b.pending,
                 (long long)b.expected, (long long)b.bytes);
    for (const auto& r : c.registers)
      if (r.waiting) complain("registers_increase: the block has only %d free", r.free);
    return false;
  }
  bool any = false;
  if (!c.transfers.empty() && (idle || (machine.seed && random(8) == 0))) {
    land_any();
    any = true;
  }
  if (machine.seed)
    for (auto& [where, g] : c.warpgroups)
      if (g.finished < issued_by_all(g) && random(8) == 0) {
        multiply_next(g);
        any = true;
      }
  return any;
}

Cluster::Cluster() : registers(size_t(machine.group())) { add_agent(advance); }

}  // namespace

// --- The instructions ---

void mbarrier_init(Shared p, int arrivals, SiteId site) {
  start(site);
  Block& block = *current->block;
  if (arrivals < 1 || arrivals >= 1 << 20) fail("%s: %d arrivals", name(site).c_str(), arrivals);
  record(p, 8, Does::kWrite, site);
  if (cluster().barriers.count({block.rank, p}))
    fail("%s: %s, there is a barrier already", name(*current).c_str(), name(site).c_str());
  Mbarrier& b = cluster().barriers[{block.rank, p}];
  b.block = &block;
  b.address = p;
  b.actor = add_actor();
  b.by = current->actor;
  b.initialised = current->epoch;
  b.expected = b.pending = arrivals;
  // A read that nobody ever sees: whoever writes there later is reported.
  record(*current, block, p, 8, Does::kRead, site, add_actor(), ~0u);
}

void fence_mbarrier_init() {
  start(0);
  for (auto& [where, b] : cluster().barriers)
    if (b.by == current->actor) b.fenced = current->epoch;
}

void mbarrier_arrive(Shared p, int rank, int64_t bytes, SiteId site) {
  Block& block = block_of(rank, site);
  Mbarrier& b = find(block, p, site);
  const bool away = &block != current->block;
  check_visible(b, away, site);
  if (away) {
    check_alive(block, site);
    visit(block, current->actor, current->epoch, site);
  }
  if (bytes < 0 || bytes >= 1 << 20) fail("%s: %lld bytes", name(site).c_str(), (long long)bytes);
  b.bytes += bytes;
  release(*current, b.arriving);
  if (b.pending == 0)
    fail("%s: %s, more arrivals than the %lld expected", name(*current).c_str(), name(site).c_str(),
         (long long)b.expected);
  --b.pending;
  try_to_complete(b);
}

void mbarrier_wait(Shared p, uint32_t parity, SiteId site) {
  Mbarrier& b = find(*current->block, p, site);
  check_visible(b, false, site);
  if (parity > 1) fail("%s: parity %u", name(site).c_str(), parity);
  ++b.waiting;
  wait_until([&] { return (b.phase & 1) != parity; }, site);
  --b.waiting;
  if (b.done) acquire(*current, &b, b.done);
}

bool mbarrier_test(Shared p, uint32_t parity, SiteId site) {
  Mbarrier& b = find(*current->block, p, site);
  check_visible(b, false, site);
  if (parity > 1) fail("%s: parity %u", name(site).c_str(), parity);
  if ((b.phase & 1) == parity) return false;
  if (b.done) acquire(*current, &b, b.done);
  return true;
}

void tma_load(Shared to, const TensorMap& map, int column, int row, Shared barrier, uint32_t blocks, SiteId site) {
  if (blocks == 0 || blocks >> machine.group()) fail("%s: blocks %x", name(site).c_str(), blocks);
  const int bytes = int(map.box_rows) * 128;
  if (column % 8)
    fail("%s: column %d; an H100 calls it an illegal instruction where rows do not begin at 16 bytes",
         name(site).c_str(), column);
  if (to % 1024)
    fail("%s: a box at %lld; the swizzle begins every 1024 bytes", name(site).c_str(), (long long)to - kSharedBase);
  if (map.planes > 0) fail("%s: a map of %lld planes", name(site).c_str(), (long long)map.planes);
  for (int rank = 0; blocks >> rank; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    Block& block = block_of(rank, site);
    check_alive(block, site);
    Mbarrier& b = find(block, barrier, site);
    each_line(map, column, row, [&](int64_t at, int, int, int64_t bytes) {
      check_global_copy(map.data + at, bytes, false, site, b.actor, b.issued + 1);
    });
    issue({&b, 0, site, &block, to, bytes, map, column, row, nullptr});
  }
}

void copy_to_block(int rank, Shared at, int bytes, Shared barrier, SiteId site) {
  Block& to = block_of(rank, site);
  if (&to == current->block) fail("%s: to the block itself", name(site).c_str());
  if (bytes <= 0 || bytes % 16) fail("%s: %d bytes", name(site).c_str(), bytes);
  check_alive(to, site);
  issue({&find(to, barrier, site), 0, site, &to, at, bytes, {}, 0, 0, current->block});
}

void tma_store(const TensorMap& map, int column, int row, int plane, Shared from, SiteId site) {
  start(site);
  if (plane < 0 || plane >= map.planes) fail("%s: plane %d of %lld", name(site).c_str(), plane, (long long)map.planes);
  if (column % 8) fail("%s: column %d", name(site).c_str(), column);
  if (from % 1024)
    fail("%s: a box at %lld; the swizzle begins every 1024 bytes", name(site).c_str(), (long long)from - kSharedBase);
  Block& block = *current->block;
  Stores& s = cluster().stores[current];
  if (s.issued++ == 0) s.actor = add_actor();
  record(*current, block, from, int(map.box_rows) * 128, Does::kRead, site, s.actor, s.issued, true);
  uint8_t* to = const_cast<uint8_t*>(map.data) + plane * map.rows * map.row_bytes;
  each_line(map, column, row, [&](int64_t at, int line, int column, int64_t bytes) {
    check_global_copy(to + at, bytes, true, site, s.actor, s.issued);
    for (int i = 0; i < int(bytes) / 2; ++i) memcpy(to + at + 2 * i, block.at(from) + swizzled(line, column + i), 2);
  });
}

// Of both waits: what they store is there when the kernel has ended, so that only the reads can come too late.
void tma_store_wait(uint32_t pending, SiteId site) {
  start(site);
  const auto found = cluster().stores.find(current);
  if (found == cluster().stores.end() || found->second.issued <= pending) return;
  Stores& s = found->second;
  s.read = std::max(s.read, s.issued - pending);
  const auto clock = std::make_shared<Clock>();
  clock->epochs.resize(s.actor + 1u);
  clock->epochs[s.actor] = s.read;
  acquire(*current, &s, clock);
}

void cluster_sync(SiteId site) {
  start(site);
  const auto arrive = [site](void**) {
    Cluster& c = cluster();
    for (const Block& block : machine.blocks)
      if (block.done) fail("threads of the cluster have ended: %s", name(site).c_str());
    join_lanes(*current->warp);
    c.clock.join(current->warp->seen);
    c.waiting.push_back(current->warp);
    if (int(c.waiting.size()) * 32 < machine.how.threads * machine.group()) return;
    for (Warp* warp : c.waiting) {
      warp->seen = c.clock;
      for (Thread* t : warp->lanes) wake(*t);
    }
    c.waiting.clear();
  };
  meet(site, nullptr, arrive, true);
}

void set_registers(int count, bool increase, SiteId site) {
  start(site);
  const int all = machine.how.threads;
  Cluster::Registers& r = cluster().registers[size_t(current->block->rank)];
  if (r.held.empty()) r.held.assign(size_t(all / 32), std::min(65536 / all / 8 * 8, 256));
  r.changed.resize(size_t(all / 32));
  const size_t w = size_t(current->index / 32), first = w / 4 * 4;
  if (int(first) + 4 > all / 32) fail("%s: a warpgroup has four warps", name(site).c_str());
  if (increase ? count < r.held[w] : count > r.held[w])
    fail("%s: from %d to %d registers", name(site).c_str(), r.held[w], count);
  const int more = (count - r.held[w]) * 32;
  meet(site, nullptr, [&](void**) { r.changed[w] = false; });
  ++r.waiting;
  wait_until([&] { return r.changed[w] || r.free >= more; }, site);
  --r.waiting;
  if (r.changed[w]) return;
  r.changed[w] = true;
  r.free -= more;
  r.held[w] = count;
}

void wgmma_fence(SiteId site) {
  Warpgroup& g = warpgroup(site);
  meet(site, nullptr, [&](void**) { g.warps[current->index / 32 - g.first].fenced = true; });
}

void wgmma_commit(SiteId site) {
  Warpgroup& g = warpgroup(site);
  meet(site, nullptr, [&](void**) {
    auto& warp = g.warps[current->index / 32 - g.first];
    ++warp.committed;
    warp.fenced = false;
  });
}

void wgmma_wait(uint32_t pending, SiteId site) {
  Warpgroup& g = warpgroup(site);
  auto& warp = g.warps[current->index / 32 - g.first];
  meet(site, nullptr, [](void**) {});
  const uint32_t group = warp.committed < pending ? 0 : warp.committed - pending;
  size_t products = 0;
  while (products < warp.issued && g.products[products].group <= group) ++products;
  wait_until([&] { return issued_by_all(g) >= products; }, site);
  while (g.finished < products) multiply_next(g);
  for (auto at = warp.accumulators.begin(); at != warp.accumulators.end();) {
    const Accumulator& d = at->second;
    if (d.group > group) {
      ++at;
      continue;
    }
    const int columns = int(d.values.size() / 16);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < columns / 2; ++i) {
        const Position p = wgmma_d(lane, i);
        d.registers[lane][i] = d.values[size_t(p.row * columns + p.column)];
      }
    at = warp.accumulators.erase(at);
  }
  if (warp.waited < group) {
    const auto done = std::make_shared<Clock>();
    done->epochs.resize(g.actor + 1u);
    done->epochs[g.actor] = warp.waited = group;
    warp.done = done;
  }
  if (warp.done) acquire(*current, &g, warp.done);
}

void wgmma(Operands mine, SiteId site) {
  Warpgroup& g = warpgroup(site);
  meet(site, &mine, [&](void** lanes) { issue_product(g, current->index / 32 - g.first, lanes, site); });
}

}  // namespace emulated
}  // namespace gpu
}  // namespace flatlora
