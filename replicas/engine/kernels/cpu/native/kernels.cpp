// All kernels for one instruction set; compiled once for each, with MILLRACE_ISA naming it.
#include "attention.h"
#include "linear.h"
#include "rowwise.h"
#include "sampling.h"
#include "step.h"

namespace millrace::MILLRACE_ISA {
namespace {

int rows_of(const Op& op, const Step& step) { return op.is_sampled ? step.num_samples : step.num_tokens; }

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Tokens of one task of a row-wise operation: enough work to be worth handing out.
constexpr int kRowsPerTask = 8;

template <class T>
int num_tasks_of(const Op& op, const Step& step, const AttentionWork& work) {
  const int rows = rows_of(op, step);
  switch (op.kind) {
    case Kind::linear:
    case Kind::linear_silu_and_mul:
      return num_tiles(op.out_features) * ceil_div(rows, row_block<T>(op));
    case Kind::attention:
      return work.num_items * op.num_kv_heads;
    case Kind::merge_attention:
      return work.num_merges * op.num_kv_heads;
    case Kind::clear_fresh_tails:
      return op.out_features;
    default:
      return ceil_div(rows, kRowsPerTask);
  }
}

template <class T>
void run_linear(const Op& op, const Step& step, int task) {
  // Neighbouring tasks share the rows, so that the weights stream past them once.
  const int tiles = num_tiles(op.out_features), block = row_block<T>(op);
  const int first = task / tiles * block, tile = task % tiles, rows = rows_of(op, step);
  const int count = rows - first < block ? rows - first : block;
  if (op.kind == Kind::linear_silu_and_mul) return linear_silu_and_mul_task<T>(op, step, first, count, tile);
  if (op.is_fp32_out) return linear_task<T, float>(op, step, first, count, tile);
  linear_task<T, T>(op, step, first, count, tile);
}

template <class T>
void run_row(const Op& op, const Step& step, int row) {
  switch (op.kind) {
    case Kind::embed: return embed_row<T>(op, step, row);
    case Kind::rope_angles: return rope_angles_row(op, step, row);
    case Kind::rms_norm: return rms_norm_row<T>(op, step, row);
    case Kind::silu_and_mul: return silu_and_mul_row<T>(op, step, row);
    case Kind::rope_and_store_kv: return rope_and_store_row<T>(op, step, row);
    case Kind::take_rows: return take_row<T>(op, step, row);
    default: return;
  }
}

template <class T>
void run_task_of(const Op& op, const Step& step, const AttentionWork& work, int task, void* scratch) {
  switch (op.kind) {
    case Kind::linear:
    case Kind::linear_silu_and_mul: return run_linear<T>(op, step, task);
    case Kind::attention: return attention_task<T>(op, step, work, task, scratch);
    case Kind::merge_attention: return merge_attention_task<T>(op, step, work, task, scratch);
    case Kind::clear_fresh_tails: return clear_fresh_tails_of_layer<T>(op, step, task);
    default: break;
  }
  const int rows = rows_of(op, step), end = (task + 1) * kRowsPerTask;
  for (int row = task * kRowsPerTask; row < (rows < end ? rows : end); ++row) run_row<T>(op, step, row);
}

int num_tasks(const Op& op, const Step& step, const AttentionWork& work) {
  return op.dtype == Dtype::bf16 ? num_tasks_of<bf16>(op, step, work) : num_tasks_of<float>(op, step, work);
}

void run_task(const Op& op, const Step& step, const AttentionWork& work, int task, void* scratch) {
  if (op.dtype == Dtype::bf16) return run_task_of<bf16>(op, step, work, task, scratch);
  run_task_of<float>(op, step, work, task, scratch);
}

size_t scratch_bytes(const Op& op) {
  if (op.kind != Kind::attention && op.kind != Kind::merge_attention) return 0;
  return op.dtype == Dtype::bf16 ? AttentionScratch<bf16>::bytes(op) : AttentionScratch<float>::bytes(op);
}

void pack(const void* weight, void* packed, int64_t out_features, int64_t in_features, Dtype dtype, int64_t tile) {
  if (dtype == Dtype::bf16)
    pack_tile(static_cast<const bf16*>(weight), static_cast<bf16*>(packed), out_features, in_features, tile);
  else
    pack_tile(static_cast<const float*>(weight), static_cast<float*>(packed), out_features, in_features, tile);
}

#define MILLRACE_TEXT(name) #name
#define MILLRACE_NAME(name) MILLRACE_TEXT(name)

}  // namespace

extern const KernelTable table;
const KernelTable table{MILLRACE_NAME(MILLRACE_ISA), num_tasks, run_task, scratch_bytes, pack,
                        max_of_row, draw_of_row, top_scratch_bytes, top_of_row};

}  // namespace millrace::MILLRACE_ISA
