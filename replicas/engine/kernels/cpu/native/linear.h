// Packed linear layers. A task is one tile of 32 output features by one block of rows.
#pragma once
#include "multiply.h"
#include "step.h"

namespace millrace::MILLRACE_ISA {

inline constexpr size_t kInputBytes = 512 * 1024;  // of the rows that one task reads: they stay in a core's L2 cache

inline constexpr std::ptrdiff_t kAheadBytes = 8192;     // of weights; past the end of a tile lies the next one

inline int num_tiles(int out_features) { return (out_features + kTile - 1) / kTile; }

template <class T>
inline int row_block(const Op& op) {
  const int fitting = int(kInputBytes / (size_t(op.in_features) * sizeof(T)));
  return fitting <= kMaxRows ? kMaxRows : fitting / kMaxRows * kMaxRows;
}

template <class T>
inline const T* tile_of(const Op& op, int tile) {
  return static_cast<const T*>(op.weight) + size_t(tile) * kTile * op.in_features;
}

template <class T>
inline Floats bias_of(const Op& op, int feature, int count) {
  return op.extra ? load_some(static_cast<const T*>(op.extra) + feature, count) : Floats{};
}

template <class T, class Out>
inline void linear_task(const Op& op, const Step& step, int first_row, int num_rows, int tile) {
  constexpr int pair = Pair<T>::size;
  const T* x = static_cast<const T*>(step.buffers[op.in0]) + size_t(first_row) * op.in_features;
  const int feature = tile * kTile, left_count = op.out_features - feature, right_count = left_count - kLanes;
  Out* out = static_cast<Out*>(step.buffers[op.out0]) + size_t(first_row) * op.out_features + feature;
  const Floats left_bias = bias_of<T>(op, feature, left_count);
  const Floats right_bias = right_count > 0 ? bias_of<T>(op, feature + kLanes, right_count) : Floats{};
  multiply_tile(x, op.in_features, num_rows, tile_of<T>(op, tile), kTile * pair, op.in_features / pair, kAheadBytes,
                [&](int row, Floats left, Floats right) {
                  Out* to = out + size_t(row) * op.out_features;
                  store_some(to, left + left_bias, left_count);
                  if (right_count > 0) store_some(to + kLanes, right + right_bias, right_count);
                });
}

// The gate's tile and the up projection's tile of the same features, and silu(gate) x up at once. The features of each
// (out_features here) are a multiple of 32.
template <class T>
inline void linear_silu_and_mul_task(const Op& op, const Step& step, int first_row, int num_rows, int tile) {
  constexpr int pair = Pair<T>::size;
  const int num_pairs = op.in_features / pair, feature = tile * kTile, width = op.out_features;
  const T* x = static_cast<const T*>(step.buffers[op.in0]) + size_t(first_row) * op.in_features;
  T* out = static_cast<T*>(step.buffers[op.out0]) + size_t(first_row) * width + feature;
  const T* gate_tile = tile_of<T>(op, tile);
  const T* up_tile = tile_of<T>(op, num_tiles(width) + tile);
  for_row_blocks(num_rows, [&](int first, auto rows) {
    Floats gate[rows][2], up[rows][2];
    const T* some = x + size_t(first) * op.in_features;
    multiply_rows<T, rows>(some, op.in_features, gate_tile, kTile * pair, num_pairs, kAheadBytes, gate);
    multiply_rows<T, rows>(some, op.in_features, up_tile, kTile * pair, num_pairs, kAheadBytes, up);
    for (int m = 0; m < rows; ++m)
      for (int side = 0; side < 2; ++side) {
        const int at = feature + side * kLanes;
        const Floats g = rounded_to<T>(gate[m][side] + bias_of<T>(op, at, kLanes));
        const Floats u = rounded_to<T>(up[m][side] + bias_of<T>(op, width + at, kLanes));
        store(out + size_t(first + m) * width + side * kLanes, rounded_to<T>(silu(g)) * u);
      }
  });
}

// (out_features, in_features) -> tile `tile`, (in_features / pair, 32, pair), zeros beyond the last feature.
template <class T>
inline void pack_tile(const T* weight, T* packed, int64_t out_features, int64_t in_features, int64_t tile) {
  constexpr int pair = Pair<T>::size;
  T* to = packed + tile * kTile * in_features;
  for (int64_t column = 0; column < kTile; ++column) {
    const int64_t feature = tile * kTile + column;
    const T* from = weight + feature * in_features;
    for (int64_t k = 0; k < in_features; ++k)
      to[(k / pair * kTile + column) * pair + k % pair] = feature < out_features ? from[k] : T{};
  }
}

}  // namespace millrace::MILLRACE_ISA
