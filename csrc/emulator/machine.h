// The machine on which kernels run without a GPU. Every CUDA thread is a fiber; the blocks of a cluster live at once,
// clusters run one after another, or all blocks live at once where the launch asks for it. ptx.h and sm90.h write the
// instructions in terms of this file.
//
// Order is judged by vector clocks, not by luck. An *actor* is a thread, the cp.async copies of one thread, or whatever
// add_actor() stands for. Every access to shared memory is kept as (actor, epoch) in a shadow of the memory, and a
// later access that conflicts with it must be made by a thread whose clock has seen that epoch. Lanes of a warp are
// actors of their own: shuffles, mma and ldmatrix meet but order no memory (as CUDA's manual has it), sync_warp does.
#pragma once

#include <cstdarg>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../cuda/device.h"  // includes this file

namespace flatlora {
namespace gpu {

using Error = int;  // 0 = success

struct Launch {
  int64_t blocks;
  int threads;
  int shared_bytes;
  void* stream;
  int cluster = 1;
  bool together = false;
};

namespace emulated {

// Where in a kernel an instruction stands. Each wrapper takes one by default: `Site site = here()`.
struct Site {
  const char *file, *function;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), const char* function = __builtin_FUNCTION(),
                    int line = __builtin_LINE()) {
  return {file, function, line};
}

// (instruction, site) as a small number; `kind` is the wrapper's name.
using SiteId = uint16_t;
SiteId site_id(const char* kind, Site site);

struct Clock {
  std::vector<uint32_t> epochs;  // by actor; what is missing is 0
  std::vector<uint32_t> fenced;  // likewise: what asynchronous accesses to shared memory may see
  std::vector<uint32_t> fenced_global;  // and to global memory
  void join(const Clock& other);
};

struct Access {
  uint32_t epoch;
  uint16_t actor;
  SiteId site;
};

// Shadow of 4 bytes: the last write of each half, and the reads since.
struct Granule {
  uint32_t generation = 0;
  Access write[2];
  std::vector<std::pair<Access, int>> reads;  // with a mask of halves
};

struct Block;
struct Warp;

struct Copy {
  Shared to;
  const void* from;
  int bytes, valid;
  uint32_t group;
  bool landed;
};

struct Thread {
  int index = 0, lane = 0;
  uint16_t actor = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;

  enum { kReady, kWaiting, kDone } state = kReady;
  const std::function<bool()>* condition = nullptr;  // of kWaiting; null: somebody will call wake()
  SiteId waits_at = 0;

  uint32_t epoch = 1;  // its own component
  uint32_t committed = 0, landed = 0;  // cp.async groups
  std::vector<Copy> copies;
  Clock acquired;  // what it has seen beyond its warp
  uint32_t fenced = 0, fenced_copies = 0;  // its epoch, and `landed`, at its last fence_proxies
  uint32_t fenced_global = 0;  // its epoch at its last fence_proxies_global
  std::vector<uint32_t> proxied;  // what it had seen by then: its own asynchronous accesses see that
  std::vector<std::pair<const uint32_t*, std::shared_ptr<const Clock>>> observed;  // counters, since its last fence_gpu
  // More that it has seen, by where from: of each place the last, which has all that earlier ones have.
  std::vector<std::pair<const void*, std::shared_ptr<const Clock>>> heard;

  void* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// One warp-wide load or store: what each lane addresses at its n-th visit of a site since the warp last met.
struct Instance {
  uint32_t address[32];
  uint32_t lanes;
  int bytes;
};

struct Warp {
  std::vector<Thread*> lanes;
  int arrived = 0, done = 0;
  SiteId meets_at = 0;
  void* arguments[32];
  Clock seen;  // by all lanes
  std::vector<uint32_t> proxied;  // of all lanes
  std::shared_ptr<void> extra;
  std::vector<std::vector<Instance>> instances;  // by site
  std::vector<std::vector<uint8_t>> visits;
  std::vector<SiteId> open;
};

struct Barrier {
  int arrived = 0, threads = 0;
  SiteId site = 0;
  Clock clock;
  std::vector<Warp*> waiting;
};

constexpr Shared kSharedBase = 1024;

struct Block {
  int64_t index = 0;
  int rank = 0, done = 0;
  std::vector<uint8_t> memory;
  std::vector<Granule> shadow;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::shared_ptr<void> extra;

  // Bytes of the block's shared memory; no check.
  uint8_t* at(Shared p) { return memory.data() + (p - kSharedBase); }
};

struct Machine {
  Launch how;
  uint32_t generation = 0;  // of the shadow; one per cluster run
  std::vector<Block> blocks;  // of the running cluster
  int actors = 0;
  std::vector<std::function<bool(bool)>> agents;
  std::shared_ptr<void> extra;
  bool failed = false;
  uint64_t random_state = 1;
  int group() const { return how.together ? int(how.blocks) : how.cluster; }  // blocks that live at once
  // Settings
  int64_t seed = 0, architecture = 80, processors = 4, checks = 1;
};
extern Machine machine;
extern Thread* current;

// --- Errors ---

// Notes a broken rule, once per text; the launch goes on and returns an error at its end.
void complain(const char* format, ...) __attribute__((format(printf, 1, 2)));
// The same, and ends the launch.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// "sync_threads at linear_sm80.h:12"
std::string name(SiteId site);
// "thread 3 of block 0"
std::string name(const Thread& thread);

// --- Synchronisation that tests take away ---

// True where the test asked for a kernel without this very instruction. Also lists the site. Called first by every
// wrapper that synchronises.
bool skipped(SiteId site);

// --- Scheduling ---

uint32_t random(uint32_t below);
// Blocks the current fiber until the condition holds. The condition is polled, and must have no effect.
void wait_until(const std::function<bool()>& condition, SiteId site);
// Blocks until another fiber calls wake().
void sleep(SiteId site);
void wake(Thread& thread);
// Asynchronous hardware: called between steps of the scheduler with `idle` = false, and with true when no thread can
// run; then it must do what is pending. Returns whether it did something. Lasts for the cluster.
void add_agent(std::function<bool(bool idle)> agent);

// All 32 lanes meet; the last one calls execute(argument of lane 0.., ) for all of them, then all go on. Orders no
// memory. `stay`: only the waker of the lanes lets them go on (the last one sleeps too).
void meet(SiteId site, void* argument, const std::function<void(void** arguments)>& execute, bool stay = false);

// --- Order ---

// A new component of all clocks.
uint16_t add_actor();
bool has_seen(const Thread& thread, uint16_t actor, uint32_t epoch);
// Orders what the thread did and has seen before whoever acquires the clock; what it does from now on is not.
void release(Thread& thread, Clock& into);
void acquire(Thread& thread, const Clock& from);
// The same, cheaper: of a clock that only grows, what it is now.
void acquire(Thread& thread, const void* place, const std::shared_ptr<const Clock>& from);
// Lanes of a warp learn from each other; what they do from now on is new. For warp-wide barriers.
void join_lanes(Warp& warp);
// fence.proxy.async: what the thread itself wrote becomes visible to asynchronous accesses ordered after it. (PTX would
// let another thread's fence serve; a kernel that relies on it hides where its fences belong.)
void fence_proxies(Thread& thread);
// fence.proxy.async.global. What one block hands to another needs it on both sides: where it was written, and where it
// has been waited for.
void fence_proxies_global(Thread& thread);

// Checks an access to the shared memory of `block` against earlier ones in the eyes of `viewer`, and keeps it as
// (actor, epoch). `proxy`: by the asynchronous proxy, to which plain writes are visible only through fence_proxies.
// Bounds and alignment are checked, too.
enum class Does { kRead, kWrite };
void record(Thread& viewer, Block& block, Shared p, int bytes, Does does, SiteId site, uint16_t actor, uint32_t epoch,
            bool proxy = false);
// An ordinary access of the current thread to its block's memory.
void record(Shared p, int bytes, Does does, SiteId site);
void poison(Block& block, Shared p, int bytes);
// Bounds and alignment alone.
void check_shared(Block& block, Shared p, int bytes, SiteId site);
void check_global(const void* p, int bytes, bool write, SiteId site);
// The same of an asynchronous access of `actor`, of any length.
void check_global_copy(const void* p, int64_t bytes, bool write, SiteId site, uint16_t actor, uint32_t epoch);
// Counters in global memory.
void add_release(uint32_t* counter, uint32_t n, SiteId site);
bool at_least(const uint32_t* counter, uint32_t least, bool wait, SiteId site);
void fence_gpu();

// --- Bank conflicts ---

// One lane's part of a warp-wide access.
void count_banks(Shared p, int bytes, SiteId site);
// A whole phase: `lanes` addresses of `bytes`.
void count_phase(const Shared* p, int lanes, int bytes, SiteId site);

// --- Launch ---

Error run(const Launch& how, const std::function<void()>& kernel);

template <class T>
T& slot(std::shared_ptr<void>& extra) {
  if (!extra) extra = std::make_shared<T>();
  return *static_cast<T*>(extra.get());
}

}  // namespace emulated
}  // namespace gpu
}  // namespace flatlora
