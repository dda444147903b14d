// Operations that look at one token at a time: embedding, angles, norms, gate, rotation and the store into the cache.
#pragma once
#include <cmath>

#include "step.h"
#include "vector.h"

namespace millrace::MILLRACE_ISA {

template <class T>
inline void embed_row(const Op& op, const Step& step, int row) {
  const T* table = static_cast<const T*>(op.weight);
  T* out = static_cast<T*>(step.buffers[op.out0]) + size_t(row) * op.out_features;
  std::memcpy(out, table + step.token_ids[row] * op.out_features, size_t(op.out_features) * sizeof(T));
}

template <class T>
inline void take_row(const Op& op, const Step& step, int row) {
  const T* in = static_cast<const T*>(step.buffers[op.in0]) + step.rows[row] * op.in_features;
  T* out = static_cast<T*>(step.buffers[op.out0]) + size_t(row) * op.in_features;
  std::memcpy(out, in, size_t(op.in_features) * sizeof(T));
}

// out (rotary_dim,): cosines, then sines.
inline void rope_angles_row(const Op& op, const Step& step, int row) {
  const int half = op.rotary_dim / 2;
  const float* inverse_frequencies = static_cast<const float*>(op.weight);
  float* out = static_cast<float*>(step.buffers[op.out0]) + size_t(row) * op.rotary_dim;
  const float position = float(step.positions[row]);
  for (int i = 0; i < half; ++i) {
    const float angle = position * inverse_frequencies[i];
    out[i] = std::cos(angle) * op.scalar;
    out[half + i] = std::sin(angle) * op.scalar;
  }
}

// out0 = norm(in0 + in1) x weight, out1 = in0 + in1; in1 may be missing. Rounds where the reference rounds.
template <class T>
inline void rms_norm_row(const Op& op, const Step& step, int row) {
  const int width = op.in_features;
  const size_t start = size_t(row) * width;
  const T* x = static_cast<const T*>(step.buffers[op.in0]) + start;
  const T* residual = op.in1 < 0 ? nullptr : static_cast<const T*>(step.buffers[op.in1]) + start;
  T* total = op.in1 < 0 ? nullptr : static_cast<T*>(step.buffers[op.out1]) + start;
  T* out = static_cast<T*>(step.buffers[op.out0]) + start;
  const T* weight = static_cast<const T*>(op.weight);
  Floats squares{};
  for (int i = 0; i < width; i += kLanes) {
    const int count = width - i;
    Floats values = load_some(x + i, count);
    if (residual) {
      values = rounded_to<T>(values + load_some(residual + i, count));
      store_some(total + i, values, count);
    }
    squares += values * values;
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / float(width) + op.scalar);
  const T* values_of = residual ? total : x;
  for (int i = 0; i < width; i += kLanes) {
    const int count = width - i;
    const Floats normed = rounded_to<T>(load_some(values_of + i, count) * scale);
    store_some(out + i, normed * load_some(weight + i, count), count);
  }
}

template <class T>
inline void silu_and_mul_row(const Op& op, const Step& step, int row) {
  const int width = op.out_features;
  const T* gate = static_cast<const T*>(step.buffers[op.in0]) + size_t(row) * 2 * width;
  T* out = static_cast<T*>(step.buffers[op.out0]) + size_t(row) * width;
  for (int i = 0; i < width; i += kLanes) {
    const int count = width - i;
    store_some(out + i, silu(load_some(gate + i, count)) * load_some(gate + width + i, count), count);
  }
}

// NeoX order: channel i turns with channel i + rotary_dim / 2.
template <class T>
inline void rotate(T* head, const float* angles, int rotary_dim) {
  const int half = rotary_dim / 2;
  for (int i = 0; i < half; i += kLanes) {
    const int count = half - i;
    const Floats cosines = load_some(angles + i, count), sines = load_some(angles + half + i, count);
    const Floats first = load_some(head + i, count), second = load_some(head + half + i, count);
    store_some(head + i, first * cosines - second * sines, count);
    store_some(head + half + i, second * cosines + first * sines, count);
  }
}

// Where a block of one K/V head keeps its values: K as tiles of 32 keys, (head_dim / pair, 32, pair) each; V as
// (block_size / pair, head_dim, pair). Both are what `multiply_tile` reads.
template <class T>
inline size_t k_offset(int key, int channel, int head_dim) {
  constexpr int pair = Pair<T>::size;
  const size_t tile = size_t(key / kTile) * kTile * head_dim;
  return tile + (size_t(channel / pair) * kTile + key % kTile) * pair + channel % pair;
}

template <class T>
inline size_t v_offset(int key, int channel, int head_dim) {
  constexpr int pair = Pair<T>::size;
  return (size_t(key / pair) * head_dim + channel) * pair + key % pair;
}

// Zeroes, in one layer, the V of every block that this step begins and leaves partly filled: what a former owner left
// there (NaN, for one) would reach the product with a probability of 0. Scores of unwritten K are overwritten anyway.
template <class T>
inline void clear_fresh_tails_of_layer(const Op& op, const Step& step, int layer) {
  const size_t block_elements = size_t(op.num_kv_heads) * step.block_size * op.head_dim;
  T* v_cache = static_cast<T*>(const_cast<void*>(op.weight)) + (size_t(layer) * 2 + 1) * op.in_features * block_elements;
  for (int request = 0; request < step.num_requests; ++request) {
    const int length = step.seq_lens[request], last_block = (length - 1) / step.block_size;
    const int num_new = step.query_start_loc[request + 1] - step.query_start_loc[request];
    if (length % step.block_size == 0 || length - num_new > last_block * step.block_size) continue;
    const int32_t block = step.block_tables[size_t(request) * step.max_blocks + last_block];
    std::memset(v_cache + block * block_elements, 0, block_elements * sizeof(T));
  }
}

// buffers[in0] (num_heads + 2 num_kv_heads, head_dim): rotates q and k in place, puts k and v into their slot.
template <class T>
inline void rope_and_store_row(const Op& op, const Step& step, int row) {
  const int head_dim = op.head_dim, num_heads = op.num_heads, num_kv_heads = op.num_kv_heads;
  T* heads = static_cast<T*>(step.buffers[op.in0]) + size_t(row) * (num_heads + 2 * num_kv_heads) * head_dim;
  const float* angles = static_cast<const float*>(step.buffers[op.in1]) + size_t(row) * op.rotary_dim;
  for (int head = 0; head < num_heads + num_kv_heads; ++head) rotate(heads + head * head_dim, angles, op.rotary_dim);
  const int64_t slot = step.slot_mapping[row];
  const int64_t block = slot / step.block_size;
  const int key = int(slot % step.block_size);
  const size_t block_elements = size_t(step.block_size) * head_dim;
  for (int head = 0; head < num_kv_heads; ++head) {
    const size_t start = (size_t(block) * num_kv_heads + head) * block_elements;
    T* k_block = static_cast<T*>(const_cast<void*>(op.weight)) + start;
    T* v_block = static_cast<T*>(const_cast<void*>(op.extra)) + start;
    const T* k = heads + size_t(num_heads + head) * head_dim;
    const T* v = k + size_t(num_kv_heads) * head_dim;
    for (int channel = 0; channel < head_dim; ++channel) {
      k_block[k_offset<T>(key, channel, head_dim)] = k[channel];
      v_block[v_offset<T>(key, channel, head_dim)] = v[channel];
    }
  }
}

}  // namespace millrace::MILLRACE_ISA
