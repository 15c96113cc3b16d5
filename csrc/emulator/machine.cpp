#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <unordered_map>

#include "launch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FLATLORA_ASAN(...) __VA_ARGS__
#else
#define FLATLORA_ASAN(...)
#endif

// Stores the callee-saved registers and the stack's pointer in *from, and goes on where `to` was stored.
extern "C" void flatlora_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.local flatlora_switch
flatlora_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr int kFrameWords = 8, kReturnWord = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.local flatlora_switch
flatlora_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr int kFrameWords = 20, kReturnWord = 11;
#else
#error "the emulator's fibers know x86-64 and aarch64"
#endif

namespace flatlora {
namespace gpu {
namespace emulated {

Machine machine;
Thread* current = nullptr;

namespace {

struct SiteInfo {
  std::string kind, file, function;
  int line;
  bool synchronises = false;
  int64_t visits = 0, instances = 0, conflicts = 0;
};
std::vector<SiteInfo> sites(1);  // 0 = none
struct Fault {
  std::string kind, file;
  int line = 0;
} fault;
SiteId fault_site = 0;

std::string report;
int report_lines = 0;
std::set<std::string> reported;
std::set<uint32_t> raced;  // pairs of sites

struct Range {
  uintptr_t begin, end;
  bool write;
};
std::vector<Range> ranges;
// Which thread of the launch wrote two bytes of global memory, and when, by page.
struct Written {
  uint32_t writer = 0, epoch = 0;
};
std::unordered_map<uintptr_t, std::vector<Written>> written;
// Asynchronous reads of what the launch wrote, by 16 bytes.
std::unordered_map<uintptr_t, std::vector<Access>> copied;
std::unordered_map<const uint32_t*, std::shared_ptr<const Clock>> counters;

std::string format_text(const char* format, va_list arguments) {
  char text[600];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

void note(const std::string& text) {
  machine.failed = true;
  if (!reported.insert(text).second || ++report_lines > 20) return;
  report += text + "\n";
}

void match_fault() {
  fault_site = 0;
  for (size_t i = 1; i < sites.size(); ++i)
    if (sites[i].kind == fault.kind && sites[i].file == fault.file && sites[i].line == fault.line)
      fault_site = SiteId(i);
}

// --- Fibers ---

constexpr size_t kStack = 256 << 10, kGuard = 64 << 10;
std::vector<uint8_t*> stacks;
void* main_stack;
const std::function<void()>* body;
bool ended;  // by fail()
FLATLORA_ASAN(const void* main_bottom; size_t main_size;)

void leave() {  // the current fiber
  FLATLORA_ASAN(__sanitizer_start_switch_fiber(current->state == Thread::kDone ? nullptr : &current->fake_stack,
                                               main_bottom, main_size);)
  flatlora_switch(&current->stack, main_stack);
  FLATLORA_ASAN(__sanitizer_finish_switch_fiber(current->fake_stack, &main_bottom, &main_size);)
}

void finish();

void enter() {
  FLATLORA_ASAN(__sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);)
  (*body)();
  finish();
  leave();
}

uint8_t* stack_of(int actor) {
  while (int(stacks.size()) <= actor) {
    void* p = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) abort();
    mprotect(p, kGuard, PROT_NONE);
    stacks.push_back(static_cast<uint8_t*>(p) + kGuard);
  }
  return stacks[actor];
}

// A process has some 65000 mappings at most, a stack is two, and tests load many emulators.
void free_stacks() {
  constexpr size_t kKept = 512;
  for (; stacks.size() > kKept; stacks.pop_back()) munmap(stacks.back() - kGuard, kGuard + kStack);
}

void prepare(Thread& t) {
  uint8_t* bottom = stack_of(t.actor);
  FLATLORA_ASAN(__asan_unpoison_memory_region(bottom, kStack);)
  void** frame = reinterpret_cast<void**>(bottom + kStack) - kFrameWords;
  std::fill(frame, frame + kFrameWords, nullptr);
  frame[kReturnWord] = reinterpret_cast<void*>(&enter);
  t.stack = frame;
}

void resume(Thread& t) {
  current = &t;
  FLATLORA_ASAN(void* fake; __sanitizer_start_switch_fiber(&fake, stack_of(t.actor), kStack);)
  flatlora_switch(&main_stack, t.stack);
  FLATLORA_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr);)
  current = nullptr;
}

// --- Bank conflicts ---

void count(const Instance& instance, SiteId site) {
  const int lanes = std::min(32, 128 / instance.bytes);
  for (int first = 0; first < 32; first += lanes) {
    Shared p[32];
    int n = 0;
    for (int lane = first; lane < first + lanes; ++lane)
      if (instance.lanes >> lane & 1) p[n++] = instance.address[lane];
    if (n) count_phase(p, n, instance.bytes, site);
  }
}

void close_instances(Warp& warp) {
  for (SiteId site : warp.open) {
    for (const Instance& i : warp.instances[site]) count(i, site);
    warp.instances[site].clear();
    std::fill(warp.visits[site].begin(), warp.visits[site].end(), 0);
  }
  warp.open.clear();
}

// --- The end of a thread ---

void finish() {
  Thread& t = *current;
  if (t.warp->arrived > 0)
    fail("%s ended while other lanes of its warp wait: %s", name(t).c_str(), name(t.warp->meets_at).c_str());
  if (t.block->barriers[0].arrived > 0)
    fail("%s ended while others wait: %s", name(t).c_str(), name(t.block->barriers[0].site).c_str());
  t.state = Thread::kDone;
  ++t.block->done;
  if (++t.warp->done == 32) close_instances(*t.warp);
}

bool run_warp(Warp& warp) {
  bool any = false;
  // A turn of random length, so that warps overtake each other.
  for (uint32_t turns = machine.seed ? 1 + random(64) : ~0u; turns > 0; --turns) {
    bool progress = false;
    for (Thread* t : warp.lanes) {
      if (t->state == Thread::kWaiting && t->condition && (*t->condition)()) t->state = Thread::kReady;
      if (t->state != Thread::kReady) continue;
      progress = any = true;
      resume(*t);
      if (ended) return true;
    }
    if (!progress) break;
  }
  return any;
}

void report_deadlock() {
  std::string text = "deadlock:";
  std::set<std::string> seen;
  for (Block& b : machine.blocks)
    for (Thread& t : b.threads)
      if (t.state == Thread::kWaiting && seen.insert(name(t.waits_at) + std::to_string(b.rank)).second &&
          seen.size() < 9)
        text += " " + name(t) + " waits for ever: " + name(t.waits_at) + ";";
  note(text);
}

void run_cluster(int64_t first) {
  const int threads = machine.how.threads, cluster = machine.group();
  machine.agents.clear();
  machine.extra.reset();
  machine.actors = 2 * threads * cluster;
  ++machine.generation;
  machine.blocks.resize(cluster);
  std::vector<Warp*> warps;
  int unfinished = 0;
  for (int rank = 0; rank < cluster; ++rank) {
    Block& b = machine.blocks[rank];
    b.index = first + rank;
    b.rank = rank;
    b.done = 0;
    b.extra.reset();
    b.memory.assign(machine.how.shared_bytes, 0xff);  // NaN in every type
    if (b.shadow.size() < b.memory.size() / 4 + 1) b.shadow.resize(b.memory.size() / 4 + 1);
    b.threads = std::vector<Thread>(threads);
    b.warps = std::vector<Warp>(threads / 32);
    for (Barrier& barrier : b.barriers) barrier = Barrier();
    for (int i = 0; i < threads; ++i) {
      Thread& t = b.threads[i];
      t.index = i;
      t.lane = i % 32;
      t.actor = uint16_t(rank * threads + i);
      t.block = &b;
      t.warp = &b.warps[i / 32];
      t.warp->lanes.push_back(&t);
      prepare(t);
    }
    for (Warp& w : b.warps) {
      w.instances.resize(sites.size());
      w.visits.resize(sites.size());
      if (machine.seed) std::rotate(w.lanes.begin(), w.lanes.begin() + random(32), w.lanes.end());
      if (machine.seed % 2) std::reverse(w.lanes.begin(), w.lanes.end());
      warps.push_back(&w);
    }
  }
  unfinished = int(warps.size());
  while (unfinished > 0) {
    if (machine.seed)
      for (size_t i = warps.size(); i > 1; --i) std::swap(warps[i - 1], warps[random(uint32_t(i))]);
    bool progress = false;
    for (Warp* w : warps) {
      if (w->done == 32) continue;
      progress |= run_warp(*w);
      if (ended) return;
      if (w->done == 32) --unfinished;
      for (auto& agent : machine.agents) progress |= agent(false);
    }
    if (progress) continue;
    for (auto& agent : machine.agents) progress |= agent(true);
    if (!progress) return report_deadlock();
  }
}

}  // namespace

// --- Sites and errors ---

SiteId site_id(const char* kind, Site site) {
  struct Slot {
    const char *kind, *file;
    int line;
    SiteId id;
  };
  static Slot table[1 << 14];
  uintptr_t hash = (reinterpret_cast<uintptr_t>(kind) * 31 + reinterpret_cast<uintptr_t>(site.file)) * 0x9e3779b1u +
                   uintptr_t(site.line) * 0x85ebca6bu;
  for (hash ^= hash >> 15;; ++hash) {
    Slot& s = table[hash % (1 << 14)];
    if (s.id && s.kind == kind && s.file == site.file && s.line == site.line) return s.id;
    if (s.id) continue;
    const char* slash = strrchr(site.file, '/');
    const std::string file = slash ? slash + 1 : site.file;
    for (size_t i = 1; i < sites.size() && !s.id; ++i)
      if (sites[i].kind == kind && sites[i].file == file && sites[i].line == site.line) s.id = SiteId(i);
    if (!s.id) {
      s.id = SiteId(sites.size());
      sites.push_back({kind, file, site.function, site.line});
      match_fault();
    }
    s.kind = kind;
    s.file = site.file;
    s.line = site.line;
    return s.id;
  }
}

std::string name(SiteId site) {
  const SiteInfo& s = sites[site];
  return s.kind + " at " + s.file + ":" + std::to_string(s.line);
}

std::string name(const Thread& thread) {
  return "thread " + std::to_string(thread.index) + " of block " + std::to_string(thread.block->index);
}

void complain(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  note(format_text(format, arguments));
  va_end(arguments);
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  note(format_text(format, arguments));
  va_end(arguments);
  ended = true;
  leave();
  abort();  // nobody resumes it
}

bool skipped(SiteId site) {
  sites[site].synchronises = true;
  ++sites[site].visits;
  return site == fault_site;
}

// --- Scheduling ---

uint32_t random(uint32_t below) {
  machine.random_state = machine.random_state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t((machine.random_state >> 33) % below);
}

void wait_until(const std::function<bool()>& condition, SiteId site) {
  if (condition()) return;
  current->state = Thread::kWaiting;
  current->condition = &condition;
  current->waits_at = site;
  leave();
}

void sleep(SiteId site) {
  current->state = Thread::kWaiting;
  current->condition = nullptr;
  current->waits_at = site;
  leave();
}

void wake(Thread& thread) { thread.state = Thread::kReady; }

void add_agent(std::function<bool(bool)> agent) { machine.agents.push_back(std::move(agent)); }

void meet(SiteId site, void* argument, const std::function<void(void**)>& execute, bool stay) {
  Thread& t = *current;
  Warp& w = *t.warp;
  if (w.done) fail("%s: %d lanes of its warp have ended: %s", name(t).c_str(), w.done, name(site).c_str());
  if (w.arrived && w.meets_at != site)
    fail("lanes of one warp diverge: %s, and %s: %s", name(w.meets_at).c_str(), name(t).c_str(), name(site).c_str());
  w.meets_at = site;
  w.arguments[t.lane] = argument;
  if (++w.arrived < 32) return sleep(site);
  w.arrived = 0;
  close_instances(w);
  t.state = Thread::kWaiting;
  t.condition = nullptr;
  t.waits_at = site;
  if (!stay)
    for (Thread* lane : w.lanes) wake(*lane);
  execute(w.arguments);
  if (t.state == Thread::kWaiting) leave();
}

// --- Order ---

static void join(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
  if (to.size() < from.size()) to.resize(from.size());
  uint32_t* a = to.data();
  const uint32_t* b = from.data();
  for (size_t i = 0, n = from.size(); i < n; ++i) a[i] = a[i] < b[i] ? b[i] : a[i];
}

void Clock::join(const Clock& other) {
  emulated::join(epochs, other.epochs);
  emulated::join(fenced, other.fenced);
  emulated::join(fenced_global, other.fenced_global);
}

static int all_threads() { return machine.how.threads * machine.group(); }

uint16_t add_actor() { return uint16_t(machine.actors++); }

static bool covers(const std::vector<uint32_t>& epochs, uint16_t actor, uint32_t epoch) {
  return actor < epochs.size() && epochs[actor] >= epoch;
}

static bool covers_fenced(const Thread& t, uint16_t actor, uint32_t epoch) {
  if (actor == t.actor) return epoch <= t.fenced;
  if (actor == t.actor + all_threads()) return epoch <= t.fenced_copies;
  if (covers(t.warp->seen.fenced, actor, epoch) || covers(t.acquired.fenced, actor, epoch)) return true;
  for (const auto& [place, clock] : t.heard)
    if (covers(clock->fenced, actor, epoch)) return true;
  return false;
}

// For an asynchronous access to global memory.
static bool covers_fenced_global(const Thread& t, uint16_t actor, uint32_t epoch) {
  if (actor == t.actor) return epoch <= t.fenced_global;
  if (!covers(t.warp->proxied, actor, epoch) && !covers(t.proxied, actor, epoch)) return false;
  if (covers(t.warp->seen.fenced_global, actor, epoch) || covers(t.acquired.fenced_global, actor, epoch)) return true;
  for (const auto& [place, clock] : t.heard)
    if (covers(clock->fenced_global, actor, epoch)) return true;
  return false;
}

bool has_seen(const Thread& t, uint16_t actor, uint32_t epoch) {
  if (actor == t.actor) return true;
  if (actor == t.actor + all_threads()) return epoch <= t.landed;
  if (covers(t.warp->seen.epochs, actor, epoch) || covers(t.acquired.epochs, actor, epoch)) return true;
  for (const auto& [place, clock] : t.heard)
    if (covers(clock->epochs, actor, epoch)) return true;
  return false;
}

// What the thread itself did and waited for.
static void add_own(const Thread& t, Clock& to) {
  const auto set = [&](std::vector<uint32_t>& epochs, uint32_t own, uint32_t copies) {
    const size_t n = size_t(all_threads());
    if (epochs.size() < 2 * n) epochs.resize(2 * n);
    epochs[t.actor] = std::max(epochs[t.actor], own);
    epochs[t.actor + n] = std::max(epochs[t.actor + n], copies);
  };
  set(to.epochs, t.epoch, t.landed);
  if (t.fenced) set(to.fenced, t.fenced, t.fenced_copies);
  if (t.fenced_global) set(to.fenced_global, t.fenced_global, 0);
}

void release(Thread& t, Clock& into) {
  into.join(t.warp->seen);
  into.join(t.acquired);
  for (const auto& [place, clock] : t.heard) into.join(*clock);
  add_own(t, into);
  ++t.epoch;
}

void acquire(Thread& t, const Clock& from) { t.acquired.join(from); }

void acquire(Thread& t, const void* place, const std::shared_ptr<const Clock>& from) {
  for (auto& [known, clock] : t.heard)
    if (known == place) return void(clock = from);
  t.heard.push_back({place, from});
}

void join_lanes(Warp& w) {
  std::set<const Clock*> joined;
  for (Thread* t : w.lanes) {
    join(w.proxied, t->proxied);
    t->proxied.clear();
    if (!t->acquired.epochs.empty() || !t->acquired.fenced.empty()) {
      w.seen.join(t->acquired);
      t->acquired = Clock();
    }
    for (const auto& [place, clock] : t->heard)
      if (joined.insert(clock.get()).second) w.seen.join(*clock);
  }
  for (Thread* t : w.lanes) {
    t->heard.clear();
    add_own(*t, w.seen);
    ++t->epoch;
  }
}

void fence_proxies(Thread& t) {
  t.fenced = t.epoch++;
  t.fenced_copies = t.landed;
}

static void check_range(const void* p, int64_t bytes, bool write, SiteId site);

void fence_proxies_global(Thread& t) {
  join(t.proxied, t.warp->seen.epochs);
  join(t.proxied, t.acquired.epochs);
  for (const auto& [place, clock] : t.heard) join(t.proxied, clock->epochs);
  t.fenced_global = t.epoch++;
}

void add_release(uint32_t* counter, uint32_t n, SiteId site) {
  check_range(counter, 4, true, site);
  std::shared_ptr<const Clock>& known = counters[counter];
  const auto clock = known ? std::make_shared<Clock>(*known) : std::make_shared<Clock>();
  release(*current, *clock);
  known = clock;
  *counter += n;
}

bool at_least(const uint32_t* counter, uint32_t least, bool wait, SiteId site) {
  check_range(counter, 4, false, site);
  if (wait) wait_until([&] { return *counter >= least; }, site);
  if (*counter < least) return false;
  const auto found = counters.find(counter);
  if (found != counters.end()) current->observed.push_back({counter, found->second});
  return true;
}

void fence_gpu() {
  for (const auto& [counter, clock] : current->observed) acquire(*current, counter, clock);
  current->observed.clear();
}

static void check_bounds(Block& block, Shared p, int bytes, int alignment, SiteId site) {
  if (p - kSharedBase + uint64_t(bytes) > block.memory.size())
    fail("%s: %s, %d bytes at %lld of %zu bytes of shared memory", name(*current).c_str(), name(site).c_str(), bytes,
         (long long)p - kSharedBase, block.memory.size());
  if (p % alignment)
    fail("%s: %s, address %lld of shared memory is not aligned to %d bytes", name(*current).c_str(), name(site).c_str(),
         (long long)p - kSharedBase, alignment);
}

void check_shared(Block& block, Shared p, int bytes, SiteId site) {
  check_bounds(block, p, bytes, bytes > 16 ? 16 : bytes, site);
}

static std::string actor_name(uint16_t actor) {
  const int n = all_threads();
  if (actor >= 2 * n) return "asynchronous hardware";
  const Block& block = machine.blocks[actor % n / machine.how.threads];
  return (actor >= n ? "copies of " : "") + name(block.threads[actor % machine.how.threads]);
}

void record(Thread& viewer, Block& block, Shared p, int bytes, Does does, SiteId site, uint16_t actor, uint32_t epoch,
            bool proxy) {
  check_shared(block, p, bytes, site);
  if (!machine.checks) return;
  const Access access{epoch, actor, site};
  const int plain = 2 * all_threads();
  auto check = [&](const Access& before, bool was_write, Shared where) {
    if (before.epoch == 0) return;
    const bool fence_missing = proxy && was_write && before.actor < plain && before.actor != actor &&
                               !covers_fenced(viewer, before.actor, before.epoch);
    const bool ordered = has_seen(viewer, before.actor, before.epoch);
    if ((ordered && !fence_missing) || !raced.insert(uint32_t(before.site) << 16 | site).second) return;
    complain("%s: %s %s (%s), then %s %s (%s), shared memory + %u", ordered ? "missing proxy fence" : "data race",
             name(before.site).c_str(), was_write ? "writes" : "reads", actor_name(before.actor).c_str(),
             name(site).c_str(), does == Does::kWrite ? "writes" : "reads", actor_name(actor).c_str(),
             where - kSharedBase);
  };
  const int mask = bytes >= 4 ? 3 : 1 << (p / 2 % 2);
  for (Shared word = p & ~3u; word < p + bytes; word += 4) {
    Granule& g = block.shadow[(word - kSharedBase) / 4];
    if (g.generation != machine.generation) {
      g.generation = machine.generation;
      g.write[0] = g.write[1] = Access{0, 0, 0};
      g.reads.clear();
    }
    for (int half = 0; half < 2; ++half)
      if (mask >> half & 1) check(g.write[half], true, word);
    if (does == Does::kWrite) {
      for (const auto& [read, halves] : g.reads)
        if (halves & mask) check(read, false, word);
      if (mask == 3) g.reads.clear();
      for (int half = 0; half < 2; ++half)
        if (mask >> half & 1) g.write[half] = access;
    } else {
      // A read that this one follows need not be kept.
      if (actor == viewer.actor)
        g.reads.erase(std::remove_if(g.reads.begin(), g.reads.end(),
                                     [&](const auto& r) {
                                       return (r.second & ~mask) == 0 && has_seen(viewer, r.first.actor, r.first.epoch);
                                     }),
                      g.reads.end());
      g.reads.push_back({access, mask});
    }
  }
}

void record(Shared p, int bytes, Does does, SiteId site) {
  record(*current, *current->block, p, bytes, does, site, current->actor, current->epoch);
}

void poison(Block& block, Shared p, int bytes) { memset(block.at(p), 0xff, size_t(bytes)); }

static void check_range(const void* p, int64_t bytes, bool write, SiteId site) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p), end = begin + uintptr_t(bytes);
  if (machine.checks && !ranges.empty() && std::none_of(ranges.begin(), ranges.end(), [&](const Range& r) {
        return r.begin <= begin && end <= r.end && (r.write || !write);
      }))
    fail("%s: %s, %lld bytes at %p that no tensor %s", name(*current).c_str(), name(site).c_str(), (long long)bytes, p,
         write ? "lets it write" : "has");
}

// `copy`: an asynchronous access, null for a plain one.
static void touch_global(const void* p, int64_t bytes, bool write, SiteId site, const Access* copy) {
  check_range(p, bytes, write, site);
  if (!machine.checks || (!write && written.empty())) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p), end = begin + uintptr_t(bytes);
  const bool together = machine.how.together;
  const uint32_t me = uint32_t(current->block->index * machine.how.threads + current->index + 1);
  const auto once = [site](SiteId other) { return raced.insert(uint32_t(other) << 16 | site).second; };
  static std::vector<Written>* page = nullptr;
  static uintptr_t page_number = 0;
  if (written.empty()) page_number = 0;
  bool handed = false;
  for (uintptr_t at = begin; at < end; at += 2) {
    if (page_number != at >> 12) {
      auto found = written.find(at >> 12);
      if (found == written.end() && !write) continue;
      page_number = at >> 12;
      page = &written[page_number];
      page->resize(2048);
    }
    Written& w = (*page)[at / 2 % 2048];
    if (w.writer && (w.writer != me || copy)) {
      handed = true;
      const uint16_t actor = uint16_t(w.writer - 1);  // where all blocks live at once
      if (!(together && has_seen(*current, actor, w.epoch))) {
        if (once(site))
          complain("%s: %s, global memory that thread %u of block %u wrote in the same launch", name(*current).c_str(),
                   name(site).c_str(), (w.writer - 1) % machine.how.threads, (w.writer - 1) / machine.how.threads);
      } else if (copy && !covers_fenced_global(*current, actor, w.epoch) && once(0)) {
        complain("missing proxy fence: %s: %s, global memory that thread %u of block %u wrote", name(*current).c_str(),
                 name(site).c_str(), (w.writer - 1) % machine.how.threads, (w.writer - 1) / machine.how.threads);
      }
    }
    if (write) w = {me, current->epoch};
  }
  if (!together) return;
  for (uintptr_t at = begin / 16; at < (end + 15) / 16; ++at) {
    if (write) {
      const auto found = copied.find(at);
      if (found == copied.end()) continue;
      for (const Access& read : found->second)
        if (!has_seen(*current, read.actor, read.epoch) && once(read.site))
          complain("data race: %s reads global memory, then %s writes there (%s)", name(read.site).c_str(),
                   name(site).c_str(), name(*current).c_str());
      copied.erase(found);
    } else if (copy && handed) {
      copied[at].push_back(*copy);
    }
  }
}

void check_global(const void* p, int bytes, bool write, SiteId site) {
  if (reinterpret_cast<uintptr_t>(p) % uintptr_t(bytes))
    fail("%s: %s, global address %p is not aligned to %d bytes", name(*current).c_str(), name(site).c_str(), p, bytes);
  touch_global(p, bytes, write, site, nullptr);
}

void check_global_copy(const void* p, int64_t bytes, bool write, SiteId site, uint16_t actor, uint32_t epoch) {
  const Access copy{epoch, actor, site};
  touch_global(p, bytes, write, site, &copy);
}

// --- Bank conflicts ---

void count_phase(const Shared* p, int lanes, int bytes, SiteId site) {
  uint32_t words[32][32];
  int distinct[32] = {}, most = 0;
  for (int lane = 0; lane < lanes; ++lane)
    for (uint32_t word = p[lane] / 4; word < (p[lane] + bytes + 3) / 4; ++word) {
      const int bank = int(word % 32);
      uint32_t* end = words[bank] + distinct[bank];
      if (std::find(words[bank], end, word) == end) words[bank][distinct[bank]++] = word;
      most = std::max(most, distinct[bank]);
    }
  ++sites[site].instances;
  sites[site].conflicts += most - 1;
}

void count_banks(Shared p, int bytes, SiteId site) {
  if (!machine.checks) return;
  Warp& w = *current->warp;
  if (w.instances.size() <= site) {
    w.instances.resize(site + 1u);
    w.visits.resize(site + 1u);
  }
  std::vector<uint8_t>& visits = w.visits[site];
  std::vector<Instance>& instances = w.instances[site];
  visits.resize(32);
  if (instances.empty()) w.open.push_back(site);
  const size_t n = visits[current->lane]++;
  if (n == 255) return close_instances(w);
  if (instances.size() <= n) instances.resize(n + 1);
  instances[n].address[current->lane] = p;
  instances[n].lanes |= 1u << current->lane;
  instances[n].bytes = bytes;
}

// --- Launch ---

static int64_t shared_limit() {
  return machine.architecture == 80 ? 166912 : machine.architecture < 90 ? 101376 : 232448;
}

Error run(const Launch& how, const std::function<void()>& kernel) {
  constexpr Error kInvalid = 1, kBroken = 719, kTooLarge = 720;  // cudaErrorInvalidValue and so on
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  report.clear();
  reported.clear();
  raced.clear();
  report_lines = 0;
  machine.failed = ended = false;
  if (how.blocks < 1 || how.blocks > 0x7fffffff || how.threads < 32 || how.threads > 1024 || how.threads % 32 ||
      how.cluster < 1 || how.cluster > 8 || how.blocks % how.cluster ||
      (how.cluster > 1 && machine.architecture < 90) || how.shared_bytes < 0 ||
      how.shared_bytes + 1024 > shared_limit()) {
    complain("launch of %lld blocks of %d threads with %d bytes of shared memory in clusters of %d",
             (long long)how.blocks, how.threads, how.shared_bytes, how.cluster);
    return kInvalid;
  }
  if (how.together && how.blocks > machine.processors) {
    complain("launch of %lld blocks at once on %lld processors", (long long)how.blocks, (long long)machine.processors);
    return kTooLarge;
  }
  machine.how = how;
  machine.random_state = uint64_t(machine.seed);
  random(2);
  written.clear();
  copied.clear();
  counters.clear();
  body = &kernel;
  const int64_t clusters = how.blocks / machine.group();
  for (int64_t i = 0; i < clusters && !machine.failed; ++i)
    run_cluster(machine.group() * (machine.seed % 2 ? clusters - 1 - i : i));
  free_stacks();
  return machine.failed ? kBroken : 0;
}

}  // namespace emulated

void emulated_device(int64_t* architecture, int64_t* processors, int64_t* shared_limit) {
  *architecture = emulated::machine.architecture;
  *processors = emulated::machine.processors;
  *shared_limit = emulated::shared_limit();
}

const char* error_text(Error error) { return error == 0 ? "" : emulated::report.c_str(); }

void allow_memory(const void* p, int64_t bytes, bool write) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  emulated::ranges.push_back({begin, begin + uintptr_t(bytes), write});
}

void forget_memory() { emulated::ranges.clear(); }

}  // namespace gpu
}  // namespace flatlora

// --- For tests/emulator.py ---

using namespace flatlora::gpu::emulated;
#define FLATLORA_EXPORT extern "C" __attribute__((visibility("default")))

FLATLORA_EXPORT int flatlora_emulator_set(const char* setting, int64_t value) {
  const std::string text = setting;
  int64_t* to = text == "seed"           ? &machine.seed
                : text == "architecture" ? &machine.architecture
                : text == "processors"   ? &machine.processors
                : text == "checks"       ? &machine.checks
                                         : nullptr;
  if (to) *to = value;
  return to ? 0 : 1;
}

// Kernels run without the synchronisation of this kind at this line; kind "" = with all.
FLATLORA_EXPORT void flatlora_emulator_fault(const char* kind, const char* file, int64_t line) {
  fault.kind = kind;
  fault.file = file;
  fault.line = int(line);
  match_fault();
}

// What broke the rules in the last launch.
FLATLORA_EXPORT const char* flatlora_emulator_report() { return report.c_str(); }

// Of all launches since the last call, a line for each site: kind, file, function, line, whether it synchronises, how
// often threads went through it if so, phases of shared memory and what bank conflicts added to them.
FLATLORA_EXPORT const char* flatlora_emulator_statistics() {
  static std::string text;
  text.clear();
  for (size_t i = 1; i < sites.size(); ++i) {
    SiteInfo& s = sites[i];
    if (s.visits || s.instances) {
      text += s.kind + "\t" + s.file + "\t" + s.function;
      for (int64_t count : {int64_t(s.line), int64_t(s.synchronises), s.visits, s.instances, s.conflicts})
        text += "\t" + std::to_string(count);
      text += "\n";
    }
    s.visits = s.instances = s.conflicts = 0;
  }
  return text.c_str();
}
