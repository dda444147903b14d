// Causal attention over the paged cache, for any mix of query lengths, with grouped heads.
//
// Keys are taken 32 at a time with a running softmax (Milakov and Gimelshein 2018), 256 keys are one segment, and segments
// are merged in order (flash decoding, Dao et al. 2023). Blocks and segments begin at fixed positions of the sequence, so
// a row's result depends on its position alone: not on the chunk it came in, nor on the threads that shared the work.
#pragma once
#include <initializer_list>
#include <limits>

#include "multiply.h"
#include "rowwise.h"

namespace millrace::MILLRACE_ISA {

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

inline int padded(int head_dim) { return (head_dim + kTile - 1) / kTile * kTile; }

// A softmax under way: per row its largest score, its sum and (width) weighted values.
struct Softmax {
  float* largest;
  float* sums;
  float* values;
  int width;

  void clear(int num_rows) const {
    for (int row = 0; row < num_rows; ++row) largest[row] = kMinusInfinity, sums[row] = 0;
    std::memset(values, 0, size_t(num_rows) * width * sizeof(float));
  }

  // Takes in `other`, which follows it in the sequence. The first is taken as it is.
  void merge(const Softmax& other, int row) const {
    if (other.largest[row] == kMinusInfinity) return;
    float* to = values + size_t(row) * width;
    const float* from = other.values + size_t(row) * width;
    if (largest[row] == kMinusInfinity) {
      largest[row] = other.largest[row];
      sums[row] = other.sums[row];
      std::memcpy(to, from, size_t(width) * sizeof(float));
      return;
    }
    const float top = largest[row] > other.largest[row] ? largest[row] : other.largest[row];
    const float mine = exp(largest[row] - top), theirs = exp(other.largest[row] - top);
    largest[row] = top;
    sums[row] = sums[row] * mine + other.sums[row] * theirs;
    for (int i = 0; i < width; i += kLanes) store(to + i, load(to + i) * mine + load(from + i) * theirs);
  }
};

// Partial results lie as (partial, K/V head, row, 2 + width): largest, sum, values.
struct Partials {
  float* base;
  int num_kv_heads, max_rows, width;

  float* at(int partial, int kv_head, int row) const {
    return base + ((size_t(partial) * num_kv_heads + kv_head) * max_rows + row) * (2 + width);
  }
};

inline Partials partials_of(const Op& op, const AttentionWork& work) {
  const int group = op.num_heads / op.num_kv_heads;
  return {work.partials, op.num_kv_heads, work.max_partial_rows * group, padded(op.head_dim)};
}

// What one thread needs for one item; laid out in its scratch memory.
template <class T>
struct AttentionScratch {
  T* queries;      // (rows, head_dim)
  T* weights;      // (rows, 32): probabilities, rounded as the values are
  float* scores;   // (rows, 32)
  float* rescale;  // (rows,)
  Softmax segment, total;

  static size_t bytes(const Op& op) { return AttentionScratch(op, nullptr).size; }

  AttentionScratch(const Op& op, void* memory) {
    const int group = op.num_heads / op.num_kv_heads, width = padded(op.head_dim);
    const size_t rows = size_t(attention_token_rows(group)) * group;
    char* at = static_cast<char*>(memory);
    const auto take = [&](size_t bytes) {
      char* taken = memory ? at + size : nullptr;
      size += (bytes + 63) / 64 * 64;
      return taken;
    };
    queries = reinterpret_cast<T*>(take(rows * op.head_dim * sizeof(T)));
    weights = reinterpret_cast<T*>(take(rows * kTile * sizeof(T)));
    scores = reinterpret_cast<float*>(take(rows * kTile * sizeof(float)));
    rescale = reinterpret_cast<float*>(take(rows * sizeof(float)));
    for (Softmax* softmax : {&segment, &total}) {
      softmax->largest = reinterpret_cast<float*>(take(rows * sizeof(float)));
      softmax->sums = reinterpret_cast<float*>(take(rows * sizeof(float)));
      softmax->values = reinterpret_cast<float*>(take(rows * width * sizeof(float)));
      softmax->width = width;
    }
  }

  size_t size = 0;
};

// 32 keys of one block for all rows. `first_key` is the position of the first of them, `first_position` that of the first
// token row; rows of one token are neighbours, `group` of them. `ahead`: bytes from these tiles to the next ones.
template <class T>
inline void attend_tile(const Op& op, AttentionScratch<T>& s, int num_rows, int group, int first_position, int first_key,
                        const T* k_tile, const T* v_tile, std::ptrdiff_t ahead) {
  constexpr int pair = Pair<T>::size;
  const int head_dim = op.head_dim, width = s.segment.width;
  multiply_tile(s.queries, head_dim, num_rows, k_tile, kTile * pair, head_dim / pair, ahead,
                [&](int row, Floats left, Floats right) {
                  float* to = s.scores + size_t(row) * kTile;
                  store(to, left * op.scalar);
                  store(to + kLanes, right * op.scalar);
                });
  for (int row = 0; row < num_rows; ++row) {
    float* scores = s.scores + size_t(row) * kTile;
    const int visible = first_position + row / group - first_key + 1;
    for (int key = visible < 0 ? 0 : visible; key < kTile; ++key) scores[key] = kMinusInfinity;
    const Floats left = load(scores), right = load(scores + kLanes);
    const float before = s.segment.largest[row];
    const float here = largest(larger(left, right));
    const float top = before > here ? before : here;
    T* weights = s.weights + size_t(row) * kTile;
    if (top == kMinusInfinity) {  // nothing visible yet in this segment
      s.rescale[row] = 1;
      store(weights, Floats{});
      store(weights + kLanes, Floats{});
      continue;
    }
    const Floats left_weights = exp(left - top), right_weights = exp(right - top);
    s.rescale[row] = exp(before - top);
    s.segment.largest[row] = top;
    s.segment.sums[row] = s.segment.sums[row] * s.rescale[row] + sum(left_weights + right_weights);
    store(weights, left_weights);
    store(weights + kLanes, right_weights);
  }
  for (int channel = 0; channel < width; channel += kTile)
    multiply_tile(s.weights, kTile, num_rows, v_tile + size_t(channel) * pair, size_t(head_dim) * pair, kTile / pair, ahead,
                  [&](int row, Floats left, Floats right) {
                    float* to = s.segment.values + size_t(row) * width + channel;
                    store(to, load(to) * s.rescale[row] + left);
                    store(to + kLanes, load(to + kLanes) * s.rescale[row] + right);
                  });
}

template <class T>
inline void write_row(const Op& op, const Step& step, int row, int head, const float* values, float sum) {
  T* out = static_cast<T*>(step.buffers[op.out0]) + (size_t(row) * op.num_heads + head) * op.head_dim;
  const float share = 1.0f / sum;
  for (int i = 0; i < op.head_dim; i += kLanes) store_some(out + i, load(values + i) * share, op.head_dim - i);
}

template <class T>
inline void attention_task(const Op& op, const Step& step, const AttentionWork& work, int task, void* memory) {
  const AttentionItem& item = work.items[task / op.num_kv_heads];
  const int kv_head = task % op.num_kv_heads, group = op.num_heads / op.num_kv_heads;
  const int head_dim = op.head_dim, num_rows = item.num_rows * group;
  AttentionScratch<T> s(op, memory);
  for (int token = 0; token < item.num_rows; ++token)
    std::memcpy(s.queries + size_t(token) * group * head_dim,
                static_cast<const T*>(step.buffers[op.in0]) + size_t(item.first_row + token) * op.row_stride +
                    size_t(kv_head) * group * head_dim,
                size_t(group) * head_dim * sizeof(T));

  const int first_position = int(step.positions[item.first_row]);
  const int num_keys = first_position + item.num_rows;  // that the last row sees
  const int32_t* table = step.block_tables + size_t(item.request) * step.max_blocks;
  const auto tile_at = [&](int key) {  // elements before the tile of `key`, in K and in V
    const size_t block = size_t(table[key / step.block_size]) * op.num_kv_heads + kv_head;
    return (block * step.block_size + key % step.block_size) * head_dim;
  };
  const T* k_cache = static_cast<const T*>(op.weight);
  const T* v_cache = static_cast<const T*>(op.extra);
  s.total.clear(num_rows);
  for (int segment = item.first_segment; segment < item.first_segment + item.num_segments; ++segment) {
    s.segment.clear(num_rows);
    const int end = num_keys < (segment + 1) * kSegmentKeys ? num_keys : (segment + 1) * kSegmentKeys;
    for (int key = segment * kSegmentKeys; key < end; key += kTile) {
      const size_t tile = tile_at(key), next = tile_at(key + kTile < num_keys ? key + kTile : key);
      const std::ptrdiff_t ahead = std::ptrdiff_t(next - tile) * std::ptrdiff_t(sizeof(T));
      attend_tile<T>(op, s, num_rows, group, first_position, key, k_cache + tile, v_cache + tile, ahead);
    }
    for (int row = 0; row < num_rows; ++row) s.total.merge(s.segment, row);
  }

  const Partials partials = partials_of(op, work);
  for (int row = 0; row < num_rows; ++row) {
    const float* values = s.total.values + size_t(row) * s.total.width;
    if (item.partial < 0) {
      write_row<T>(op, step, item.first_row + row / group, kv_head * group + row % group, values, s.total.sums[row]);
    } else {
      float* to = partials.at(item.partial, kv_head, row);
      to[0] = s.total.largest[row];
      to[1] = s.total.sums[row];
      std::memcpy(to + 2, values, size_t(s.total.width) * sizeof(float));
    }
  }
}

template <class T>
inline void merge_attention_task(const Op& op, const Step& step, const AttentionWork& work, int task, void* memory) {
  const MergeItem& item = work.merges[task / op.num_kv_heads];
  const int kv_head = task % op.num_kv_heads, group = op.num_heads / op.num_kv_heads;
  const Partials partials = partials_of(op, work);
  const AttentionScratch<T> s(op, memory);
  for (int row = 0; row < item.num_rows * group; ++row) {
    Softmax total = s.total;
    total.clear(1);
    for (int partial = item.first; partial < item.first + item.count; ++partial) {
      float* from = partials.at(partial, kv_head, row);
      total.merge(Softmax{from, from + 1, from + 2, total.width}, 0);
    }
    write_row<T>(op, step, item.first_row + row / group, kv_head * group + row % group, total.values, total.sums[0]);
  }
}

}  // namespace millrace::MILLRACE_ISA
