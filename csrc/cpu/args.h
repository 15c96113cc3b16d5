// One instruction-set level's kernels, as api.cpp sees them.
#pragma once

#include "../common/args.h"

namespace flatlora {

// How the work of one LinearArgs is cut; see plan_linear in matmul.h.
struct LinearPlan {
  int64_t block;  // outputs per task
  int64_t chunk;  // contraction length of a panel
  int64_t rows;   // rows of `a` per pass over the weight
  int64_t parts;  // tasks that share the rows of a group
  int64_t tasks;
  int64_t threads;
  int64_t workspace;  // bytes per thread
};

// How the work of one TransformArgs is cut; see plan_transform in transform.h.
struct TransformPlan {
  int64_t rows;  // of `a` per task
  int64_t tasks;
  int64_t workspace;  // bytes per thread
};

// One instruction-set level's kernels. A task may run on any thread and in any order; results do not depend on it.
struct Kernels {
  const char* name;
  LinearPlan (*plan_linear)(const LinearArgs&, int64_t threads);
  void (*linear)(const LinearArgs&, const LinearPlan&, int64_t task, void* workspace);
  int64_t (*row_norms_tasks)(const RowNormsArgs&);
  int64_t (*row_norms_workspace)(const RowNormsArgs&);  // bytes per thread
  void (*row_norms)(const RowNormsArgs&, int64_t task, void* workspace);
  int64_t (*perturb_tasks)(const PerturbArgs&);
  void (*perturb)(const PerturbArgs&, int64_t task);
  TransformPlan (*plan_transform)(const TransformArgs&, int64_t threads);
  void (*transform)(const TransformArgs&, const TransformPlan&, int64_t task, void* workspace);
};

}  // namespace flatlora
