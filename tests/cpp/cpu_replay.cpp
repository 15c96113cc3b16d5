// Repeats calls of the CPU library, as `python -m tests.fuzz --trace FILE` writes them, on threads of its own and in
// memory of exactly the sizes that the calls need. Built with a sanitizer, as the library, every access is seen: with
// torch's thread pool and allocator beside it, half of them would not be.
//
//   cpu_replay FILE [plant]
//
// Each call runs on one thread and on four, and must write the same bytes. A plant is a mistake that the sanitizer has
// to find: "read" and "write" make an input or the output an element too short, "race" gives two threads one workspace.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/common/args.h"

using namespace flatlora;

extern "C" {
int32_t flatlora_cpu_init(const char* level, void* parallel_for, void* num_threads);
int32_t flatlora_cpu_linear(const LinearArgs*);
int32_t flatlora_cpu_row_sq_norms(const RowNormsArgs*);
int32_t flatlora_cpu_perturb(const PerturbArgs*);
int32_t flatlora_cpu_transform(const TransformArgs*);
}

namespace {

uint32_t g_threads = 1;
std::string g_plant;

int32_t num_threads(uint32_t* out) {
  *out = g_threads;
  return 0;
}

int32_t parallel_for(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> pool;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t worker = g_plant == "race" ? begin : i;
    pool.emplace_back([=] { body(worker, worker + 1, context); });
  }
  for (auto& thread : pool) thread.join();
  return 0;
}

int64_t size_of(int64_t dtype) { return DType(dtype) == DType::kFloat64 ? 8 : DType(dtype) == DType::kFloat32 ? 4 : 2; }

// Elements from the first to the last of a matrix.
int64_t extent(int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  return rows == 0 || cols == 0 ? 0 : (rows - 1) * row_stride + (cols - 1) * col_stride + 1;
}

// The memory of one call.
struct Memory {
  std::vector<void*> all;
  uint64_t state = 1;

  // Numbers in [0.5, 2), of either sign. A null pointer of the call stays one.
  void put(const void*& p, int64_t dtype, int64_t count, bool is_short = false) {
    if (p == nullptr || count == 0) return;
    count -= is_short;
    const int64_t size = size_of(dtype);
    auto* bytes = static_cast<char*>(malloc(size_t(count * size)));
    for (int64_t i = 0; i < count; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const double magnitude = 0.5 + double(state >> 40) / double(1 << 24) * 1.5;
      const double x = state >> 39 & 1 ? -magnitude : magnitude;
      const float f = float(x);
      uint32_t bits;
      memcpy(&bits, &f, 4);
      // The exponent is that of 0.5 or 1: sign, exponent and the upper bits of the mantissa.
      const uint16_t half =
          uint16_t(bits >> 16 & 0x8000) | uint16_t(((bits >> 23 & 0xff) - 112) << 10) | uint16_t(bits >> 13 & 0x3ff);
      const uint16_t brain = uint16_t(bits >> 16);
      const void* value = size == 8 ? static_cast<const void*>(&x) : &f;
      if (size == 2) value = DType(dtype) == DType::kBFloat16 ? &brain : &half;
      memcpy(bytes + i * size, value, size_t(size));
    }
    p = bytes;
    all.push_back(bytes);
  }
  void put(void*& p, int64_t dtype, int64_t count) {
    const void* q = p;
    put(q, dtype, count);
    p = const_cast<void*>(q);
  }
  void put(const float*& p, int64_t count) {
    const void* q = p;
    put(q, int64_t(DType::kFloat32), count);
    p = static_cast<const float*>(q);
  }
  void put(const int64_t*& p) {
    if (p == nullptr) return;
    auto* seed = static_cast<int64_t*>(malloc(8));
    *seed = 0x123456789;
    p = seed;
    all.push_back(seed);
  }
  void put(NoiseArgs& noise, int64_t N) {
    put(noise.scale, extent(N, 1, noise.scale_stride, 0));
    put(noise.seed);
  }
  ~Memory() {
    for (void* p : all) free(p);
  }
};

using Bytes = std::vector<char>;

// Room for the output, which is copied out and freed after the call.
template <class Args, class T>
Bytes call(int32_t (*function)(const Args*), Args& args, T*& out, int64_t bytes, int64_t element) {
  const size_t has = size_t(g_plant == "write" && bytes > 0 ? bytes - element : bytes);
  void* room = malloc(has);
  memset(room, 0, has);
  out = static_cast<T*>(room);
  if (const int32_t error = function(&args)) {
    fprintf(stderr, "failed with code %d\n", error);
    exit(1);
  }
  Bytes result(static_cast<char*>(room), static_cast<char*>(room) + bytes);
  free(room);
  return result;
}

Bytes linear(LinearArgs args, Memory& memory) {
  const int64_t contraction = args.input_grad ? args.N : args.K, outputs = args.input_grad ? args.K : args.N;
  memory.put(args.a, args.dtype, extent(args.M, contraction, args.a_row_stride, args.a_col_stride), g_plant == "read");
  memory.put(args.weight.data, args.dtype, extent(args.N, args.K, args.weight.row_stride, args.weight.col_stride));
  memory.put(args.u, args.dtype, args.M * args.rank);
  memory.put(args.lora, args.lora_dtype, extent(outputs, args.rank, args.lora_out_stride, args.lora_rank_stride));
  memory.put(args.bias, args.bias_dtype, extent(outputs, 1, args.bias_stride, 0));
  memory.put(args.noise, args.N);
  return call(flatlora_cpu_linear, args, args.y, args.M * outputs * size_of(args.dtype), size_of(args.dtype));
}

Bytes row_sq_norms(RowNormsArgs args, Memory& memory) {
  memory.put(args.weight.data, args.dtype, extent(args.N, args.K, args.weight.row_stride, args.weight.col_stride),
             g_plant == "read");
  memory.put(args.lora_A, args.A_dtype, extent(args.rank, args.K, args.A_rank_stride, args.A_col_stride));
  memory.put(args.lora_B, args.B_dtype, extent(args.N, args.rank, args.B_row_stride, args.B_rank_stride));
  return call(flatlora_cpu_row_sq_norms, args, args.out, args.N * 4, 4);
}

Bytes perturb(PerturbArgs args, Memory& memory) {
  memory.put(args.weight.data, args.dtype, extent(args.N, args.K, args.weight.row_stride, args.weight.col_stride),
             g_plant == "read");
  memory.put(args.noise, args.N);
  const int64_t bytes = extent(args.N, args.K, args.out_row_stride, args.out_col_stride) * size_of(args.dtype);
  return call(flatlora_cpu_perturb, args, args.out, bytes, size_of(args.dtype));
}

Bytes transform(TransformArgs args, Memory& memory) {
  const int64_t contraction = args.input_grad ? args.N : args.K, outputs = args.input_grad ? args.K : args.N;
  memory.put(args.a, args.dtype, extent(args.M, contraction, args.a_row_stride, args.a_col_stride), g_plant == "read");
  memory.put(args.noise, args.N);
  return call(flatlora_cpu_transform, args, args.y, args.M * outputs * size_of(args.dtype), size_of(args.dtype));
}

template <class Args>
void repeat(Bytes (*run)(Args, Memory&), const Bytes& packed, const char* name, int number) {
  Args args;
  if (packed.size() != sizeof(Args)) {
    fprintf(stderr, "%s: expected %zu bytes, got %zu\n", name, sizeof(Args), packed.size());
    exit(1);
  }
  memcpy(&args, packed.data(), sizeof(Args));
  Bytes first;
  for (uint32_t threads : {1, 4}) {
    g_threads = threads;
    Memory memory;
    const Bytes result = run(args, memory);
    if (threads != 1 && result != first && g_plant.empty()) {
      fprintf(stderr, "call %d, %s: other bytes with %u threads\n", number, name, threads);
      exit(1);
    }
    first = result;
  }
}

}  // namespace

int main(int count, char** arguments) {
  FILE* file = count > 1 ? fopen(arguments[1], "rb") : nullptr;
  if (file == nullptr) {
    fprintf(stderr, "usage: cpu_replay FILE [read|write|race]\n");
    return 1;
  }
  if (count > 2) g_plant = arguments[2];
  char level[32], name[32];
  size_t size;
  int number = 0;
  for (; fscanf(file, "%31s %31s %zu", level, name, &size) == 3; ++number) {
    fgetc(file);
    Bytes packed(size);
    if (fread(packed.data(), 1, size, file) != size) return 1;
    if (flatlora_cpu_init(level, reinterpret_cast<void*>(parallel_for), reinterpret_cast<void*>(num_threads))) {
      fprintf(stderr, "call %d: level %s does not run here\n", number, level);
      return 1;
    }
    const std::string function = name;
    if (function == "linear") repeat(linear, packed, name, number);
    if (function == "row_sq_norms") repeat(row_sq_norms, packed, name, number);
    if (function == "perturb") repeat(perturb, packed, name, number);
    if (function == "transform") repeat(transform, packed, name, number);
  }
  printf("%d calls\n", number);
  return 0;
}
