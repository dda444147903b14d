// The library's interface: plain C functions over the structs of step.h.
#include <algorithm>
#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "pool.h"
#include "step.h"

#define MILLRACE_DECLARE(isa)      \
  namespace millrace::isa {        \
  extern const KernelTable table;  \
  }
MILLRACE_DECLARE(portable)
#if defined(MILLRACE_X86)
MILLRACE_DECLARE(avx2)
MILLRACE_DECLARE(avx512)
MILLRACE_DECLARE(avx512_bf16)
#endif

namespace millrace {
namespace {

// The tables that this processor can run, best first.
std::vector<const KernelTable*> runnable_tables() {
  std::vector<const KernelTable*> tables;
#if defined(MILLRACE_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512cd");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512_bf16::table);
  if (has_avx512) tables.push_back(&avx512::table);
  if (has_avx2) tables.push_back(&avx2::table);
#endif
  tables.push_back(&portable::table);
  return tables;
}

// Scratch memory that grows and is never handed back before the end.
class Memory {
 public:
  ~Memory() { std::free(data_); }
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

void check_tokens(const Step& step, int64_t vocab_size) {
  for (int i = 0; i < step.num_tokens; ++i)
    if (step.token_ids[i] < 0 || step.token_ids[i] >= vocab_size) throw std::out_of_range("token id");
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Cuts a step's attention into items: the same cut for every layer.
class AttentionPlanner {
 public:
  AttentionWork plan(const Op& op, const Step& step) {
    items_.clear();
    merges_.clear();
    num_partials_ = 0;
    max_partial_rows_ = 0;
    const int max_rows = attention_token_rows(op.num_heads / op.num_kv_heads);
    for (int request = 0; request < step.num_requests; ++request) {
      const int begin = step.query_start_loc[request], end = step.query_start_loc[request + 1];
      for (int first = begin; first < end; first += max_rows) add(request, first, std::min(max_rows, end - first), step);
    }
    const size_t group = op.num_heads / op.num_kv_heads, width = ceil_div(op.head_dim, kTile) * kTile;
    const size_t partial_floats = op.num_kv_heads * max_partial_rows_ * group * (2 + width);
    void* partials = partials_.at_least(num_partials_ * partial_floats * sizeof(float));
    return {items_.data(), int(items_.size()), merges_.data(), int(merges_.size()), static_cast<float*>(partials),
            max_partial_rows_};
  }

 private:
  void add(int request, int first, int num_rows, const Step& step) {
    const int num_keys = int(step.positions[first]) + num_rows;
    const int num_segments = ceil_div(num_keys, kSegmentKeys);
    if (num_segments == 1 || num_rows > kMaxSplitRows) {
      items_.push_back({request, first, num_rows, 0, num_segments, -1});
      return;
    }
    merges_.push_back({first, num_rows, num_partials_, num_segments});
    max_partial_rows_ = std::max(max_partial_rows_, num_rows);
    for (int segment = 0; segment < num_segments; ++segment)
      items_.push_back({request, first, num_rows, segment, 1, num_partials_++});
  }

  std::vector<AttentionItem> items_;
  std::vector<MergeItem> merges_;
  int num_partials_ = 0;
  int max_partial_rows_ = 0;
  Memory partials_;
};

// Owner of threads and scratch memory; one per process and number of threads. Runs one thing at a time.
class Machine {
 public:
  Machine(const KernelTable& table, int num_threads, std::vector<int> processors)
      : table_(table), pool_(num_threads, std::move(processors)), scratch_(num_threads) {}

  const char* name() const { return table_.name; }

  void run(const Op* ops, int num_ops, const Step& step) {
    AttentionWork work{};
    size_t scratch_bytes = 0;
    for (const Op* op = ops; op < ops + num_ops; ++op) {
      scratch_bytes = std::max(scratch_bytes, table_.scratch_bytes(*op));
      if (op->kind == Kind::attention && !work.items) work = planner_.plan(*op, step);
      if (op->kind == Kind::embed) check_tokens(step, op->in_features);
    }
    const std::vector<void*> scratch = scratch_of_threads(scratch_bytes);
    pool_.run([&](int thread) {
      for (const Op* op = ops; op < ops + num_ops; ++op) {
        const int count = table_.num_tasks(*op, step, work);
        if (count == 0) continue;
        pool_.phase(thread, count, [&](int task) { table_.run_task(*op, step, work, task, scratch[thread]); });
      }
    });
  }

  void pack(const void* weight, void* packed, int64_t out_features, int64_t in_features, Dtype dtype) {
    const int num_tiles = int((out_features + kTile - 1) / kTile);
    for_each(num_tiles, [&](int, int tile) { table_.pack(weight, packed, out_features, in_features, dtype, tile); });
  }

  void max_of_rows(const float* scores, int num_rows, int64_t size, float* best, int64_t* ids) {
    for_each(num_rows, [&](int, int row) { table_.max_of_row(scores + row * size, size, best + row, ids + row); });
  }

  void draw_of_rows(const DrawRow* rows, int num_rows, int64_t size, int64_t* ids) {
    for_each(num_rows, [&](int, int row) { ids[row] = table_.draw_of_row(rows[row], size); });
  }

  void top_of_rows(const DrawRow* rows, int num_rows, int64_t size, int64_t width, float* values, int64_t* ids,
                   double* totals) {
    const std::vector<void*> scratch = scratch_of_threads(table_.top_scratch_bytes(size));
    for_each(num_rows, [&](int thread, int row) {
      table_.top_of_row(rows[row], size, width, values + row * width, ids + row * width, totals + row, scratch[thread]);
    });
  }

 private:
  template <class Task>
  void for_each(int count, Task&& task) {
    if (count == 1) return task(0, 0);
    pool_.run([&](int thread) { pool_.phase(thread, count, [&](int i) { task(thread, i); }); });
  }

  std::vector<void*> scratch_of_threads(size_t bytes) {
    std::vector<void*> scratch;
    for (auto& memory : scratch_) scratch.push_back(memory.at_least(bytes));
    return scratch;
  }

  const KernelTable& table_;
  Pool pool_;
  AttentionPlanner planner_;
  std::vector<Memory> scratch_;
};

enum Status { kDone = 0, kNoMemory = 1, kNoSuchToken = 2 };

template <class Work>
int guarded(Work&& work) {
  try {
    work();
    return kDone;
  } catch (const std::out_of_range&) {
    return kNoSuchToken;
  } catch (const std::exception&) {
    return kNoMemory;
  }
}

}  // namespace
}  // namespace millrace

using namespace millrace;

#pragma GCC visibility push(default)
extern "C" {

// Names of the instruction sets that this processor can run, best first, separated by spaces.
const char* millrace_instruction_sets() {
  static const std::string names = [] {
    std::string all;
    for (const KernelTable* table : runnable_tables()) all.append(all.empty() ? "" : " ").append(table->name);
    return all;
  }();
  return names.c_str();
}

// `processors`: what the threads share out among themselves (pool.h). Null: no such instruction set here, or no memory
// or threads.
void* millrace_open(const char* instruction_set, int num_threads, const int32_t* processors, int num_processors) {
  Machine* machine = nullptr;
  for (const KernelTable* table : runnable_tables())
    if (std::string(table->name) == instruction_set) {
      guarded([&] { machine = new Machine(*table, num_threads, {processors, processors + num_processors}); });
      break;
    }
  return machine;
}

void millrace_close(void* machine) { delete static_cast<Machine*>(machine); }

// These return a Status.
int millrace_run(void* machine, const Op* ops, int num_ops, const Step* step) {
  return guarded([&] { static_cast<Machine*>(machine)->run(ops, num_ops, *step); });
}

int millrace_pack(void* machine, const void* weight, void* packed, int64_t out_features, int64_t in_features,
                  int dtype) {
  return guarded(
      [&] { static_cast<Machine*>(machine)->pack(weight, packed, out_features, in_features, Dtype(dtype)); });
}

int millrace_max_of_rows(void* machine, const float* scores, int num_rows, int64_t size, float* best, int64_t* ids) {
  return guarded([&] { static_cast<Machine*>(machine)->max_of_rows(scores, num_rows, size, best, ids); });
}

int millrace_draw_of_rows(void* machine, const DrawRow* rows, int num_rows, int64_t size, int64_t* ids) {
  return guarded([&] { static_cast<Machine*>(machine)->draw_of_rows(rows, num_rows, size, ids); });
}

int millrace_top_of_rows(void* machine, const DrawRow* rows, int num_rows, int64_t size, int64_t width, float* values,
                         int64_t* ids, double* totals) {
  return guarded(
      [&] { static_cast<Machine*>(machine)->top_of_rows(rows, num_rows, size, width, values, ids, totals); });
}

}  // extern "C"
#pragma GCC visibility pop
