// The C interface that flatlora_kernels/backends/cpu.py binds: run-time choice of the instruction set, and the loop
// over tasks on torch's own thread pool.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../common/abi.h"
#include "args.h"

namespace flatlora {

#define DECLARE(isa)             \
  namespace isa {                \
  extern const Kernels kKernels; \
  }
DECLARE(baseline)
#if defined(FLATLORA_HAVE_AVX2)
DECLARE(avx2)
#endif
#if defined(FLATLORA_HAVE_AVX512)
DECLARE(avx512)
#endif
#if defined(FLATLORA_HAVE_AVX512BF16)
DECLARE(avx512bf16)
#endif

namespace {

struct Level {
  const Kernels* kernels;
  bool (*supported)();
};

// Best first. The checks include what the operating system saves on a context switch.
const Level kLevels[] = {
#if defined(FLATLORA_HAVE_AVX512BF16)
    {&avx512bf16::kKernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512bf16");
     }},
#endif
#if defined(FLATLORA_HAVE_AVX512)
    {&avx512::kKernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
#if defined(FLATLORA_HAVE_AVX2)
    {&avx2::kKernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {&baseline::kKernels, [] { return true; }},
};

// Filled while the library is loaded: a static of a function would need the C++ runtime for its guard, and through it a
// newer glibc.
const char* const kNames = [] {
  static char text[64] = "";
  for (const auto& level : kLevels)
    if (level.supported()) strcat(strcat(text, *text ? " " : ""), level.kernels->name);
  return text;
}();

// torch_parallel_for and torch_get_num_threads of torch's stable C interface (torch 2.10).
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*);
using GetNumThreads = int32_t (*)(uint32_t*);

const Kernels* g_kernels = nullptr;
ParallelFor g_parallel_for = nullptr;
GetNumThreads g_num_threads = nullptr;

int64_t num_threads() {
  uint32_t threads = 1;
  g_num_threads(&threads);
  return threads > 0 ? threads : 1;
}

// Threads take tasks as they come free; which thread runs a task changes no result. `workspace`: bytes per thread.
template <class Body>
int32_t for_each_task(int64_t tasks, int64_t threads, int64_t workspace, const Body& body) {
  struct Context {
    const Body& body;
    int64_t tasks, stride;
    char* workspaces;
    std::atomic<int64_t> next;
  };
  if (threads > tasks) threads = tasks;
  const int64_t stride = (workspace + 63) / 64 * 64;
  Context context{body, tasks, stride, static_cast<char*>(aligned_alloc(64, size_t(stride * threads))), {0}};
  if (workspace != 0 && context.workspaces == nullptr) return 2;
  const auto work = [](int64_t begin, int64_t end, void* p) {
    auto& c = *static_cast<Context*>(p);
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task; (task = c.next.fetch_add(1, std::memory_order_relaxed)) < c.tasks;)
        c.body(task, c.workspaces + worker * c.stride);
  };
  int32_t error = 0;
  if (threads <= 1) {
    work(0, 1, &context);
  } else {
    error = g_parallel_for(0, threads, 1, work, &context);
  }
  free(context.workspaces);
  return error;
}

}  // namespace
}  // namespace flatlora

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* flatlora_cpu_abi() {
  return flatlora::kAbi<flatlora::LinearArgs, flatlora::RowNormsArgs, flatlora::PerturbArgs, flatlora::TransformArgs,
                       flatlora::PackedArgs>.text;
}

// Names of the levels that this processor runs, best first, separated by spaces.
EXPORT const char* flatlora_cpu_levels() { return flatlora::kNames; }

// 0, or 1 where `level` is unknown or does not run here.
EXPORT int32_t flatlora_cpu_init(const char* level, void* parallel_for, void* num_threads) {
  flatlora::g_parallel_for = reinterpret_cast<flatlora::ParallelFor>(parallel_for);
  flatlora::g_num_threads = reinterpret_cast<flatlora::GetNumThreads>(num_threads);
  for (const auto& candidate : flatlora::kLevels) {
    if (strcmp(candidate.kernels->name, level) == 0 && candidate.supported()) {
      flatlora::g_kernels = candidate.kernels;
      return 0;
    }
  }
  return 1;
}

// These return 0, or 2 where the workspace could not be had, or torch's error code.
EXPORT int32_t flatlora_cpu_linear(const flatlora::LinearArgs* args) {
  const flatlora::Kernels& k = *flatlora::g_kernels;
  const flatlora::LinearPlan plan = k.plan_linear(*args, flatlora::num_threads());
  return flatlora::for_each_task(plan.tasks, plan.threads, plan.workspace,
                                 [&](int64_t task, void* workspace) { k.linear(*args, plan, task, workspace); });
}

EXPORT int32_t flatlora_cpu_row_sq_norms(const flatlora::RowNormsArgs* args) {
  const flatlora::Kernels& k = *flatlora::g_kernels;
  return flatlora::for_each_task(k.row_norms_tasks(*args), flatlora::num_threads(), k.row_norms_workspace(*args),
                                 [&](int64_t task, void* workspace) { k.row_norms(*args, task, workspace); });
}

EXPORT int32_t flatlora_cpu_perturb(const flatlora::PerturbArgs* args) {
  const flatlora::Kernels& k = *flatlora::g_kernels;
  return flatlora::for_each_task(k.perturb_tasks(*args), flatlora::num_threads(), 0,
                                 [&](int64_t task, void*) { k.perturb(*args, task); });
}

EXPORT int32_t flatlora_cpu_transform(const flatlora::TransformArgs* args) {
  const flatlora::Kernels& k = *flatlora::g_kernels;
  const int64_t threads = flatlora::num_threads();
  const flatlora::TransformPlan plan = k.plan_transform(*args, threads);
  return flatlora::for_each_task(plan.tasks, threads, plan.workspace,
                                 [&](int64_t task, void* workspace) { k.transform(*args, plan, task, workspace); });
}
