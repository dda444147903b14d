// What Python and the kernels agree on: the operations of a program and the columns of one step.
// `replicas/engine/kernels/cpu/library.py` mirrors both structs field by field.
#pragma once
#include <cstddef>
#include <cstdint>

namespace millrace {

enum class Kind : int32_t {
  embed,
  rope_angles,
  rms_norm,
  linear,
  linear_silu_and_mul,
  silu_and_mul,
  rope_and_store_kv,
  attention,
  merge_attention,
  take_rows,
  clear_fresh_tails,
};

enum class Dtype : int32_t { bf16, fp32 };

// Operands are indices into the step's buffers, each (rows, width) and contiguous; -1: none.
struct Op {
  Kind kind;
  Dtype dtype;
  int32_t is_sampled;   // rows are the sampled ones, not all tokens
  int32_t in0, in1, out0, out1;
  int32_t in_features;  // width of in0 that is read; embed: size of the vocabulary; clear: blocks of the cache
  int32_t out_features; // clear: layers of the cache
  int32_t num_heads, num_kv_heads, head_dim, rotary_dim;
  int32_t row_stride;   // elements from row to row of the queries
  int32_t is_fp32_out;  // linear: logits
  float scalar;         // norm: epsilon; angles: factor; attention: scale
  const void* weight;   // packed matrix, norm weight, embedding table, inverse frequencies, K cache or all of the cache
  const void* extra;    // bias or V cache
};

struct Step {
  int32_t num_tokens, num_requests, num_samples, block_size, max_blocks;
  const int64_t* token_ids;         // (num_tokens,)
  const int64_t* positions;         // (num_tokens,)
  const int64_t* slot_mapping;      // (num_tokens,)
  const int32_t* query_start_loc;   // (num_requests + 1,)
  const int32_t* seq_lens;          // (num_requests,)
  const int32_t* block_tables;      // (num_requests, max_blocks)
  const int64_t* rows;              // (num_samples,)
  void* const* buffers;             // one for each operand
};

// One piece of attention: query rows of one request over a range of its key segments.
struct AttentionItem {
  int32_t request;
  int32_t first_row, num_rows;           // rows of the token columns
  int32_t first_segment, num_segments;
  int32_t partial;                       // index of its partial result, -1: it writes the output itself
};

// A row whose segments were attended apart: partial results `first` ... `first + count - 1` make its output.
struct MergeItem {
  int32_t first_row, num_rows, first, count;
};

// Of one step, shared by all its layers. Depends on shapes alone.
struct AttentionWork {
  const AttentionItem* items;
  int32_t num_items;
  const MergeItem* merges;
  int32_t num_merges;
  float* partials;
  int32_t max_partial_rows;  // token rows that a partial result has room for
};

inline constexpr int kSegmentKeys = 256;   // keys whose softmax is summed alone; segments are merged in order
inline constexpr int kTile = 32;           // output features of a packed tile; keys of a K tile
inline constexpr int kMaxSplitRows = 4;    // token rows up to which the segments of a request go to different threads

// Rows (token x query head of one K/V head) that one attention item holds at most.
static constexpr int attention_token_rows(int group) { return group >= 48 ? 1 : 48 / group; }

// A row of scores from which one token is to be drawn.
struct DrawRow {
  const float* scores;
  float best, temperature, threshold;
  uint32_t seed_low, seed_high, position_low, position_high;
};

struct KernelTable {
  const char* name;
  int (*num_tasks)(const Op&, const Step&, const AttentionWork&);
  void (*run_task)(const Op&, const Step&, const AttentionWork&, int task, void* scratch);
  size_t (*scratch_bytes)(const Op&);
  void (*pack)(const void* weight, void* packed, int64_t out_features, int64_t in_features, Dtype dtype, int64_t tile);
  void (*max_of_row)(const float* scores, int64_t size, float* best, int64_t* id);
  int64_t (*draw_of_row)(const DrawRow& row, int64_t size);
  size_t (*top_scratch_bytes)(int64_t size);
  void (*top_of_row)(const DrawRow& row, int64_t size, int64_t width, float* values, int64_t* ids, double* total,
                     void* scratch);
};

}  // namespace millrace
