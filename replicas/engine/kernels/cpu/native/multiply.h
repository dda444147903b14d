// Rows times one packed tile: the inner loop of every linear layer and of attention.
//
// A tile has 32 columns, packed as (in_features / pair, 32, pair). Each output is one chain of additions along
// in_features, in order, whatever the number of rows: so a result never depends on what else is in the batch.
#pragma once
#include "vector.h"

namespace millrace::MILLRACE_ISA {

#if defined(__AVX512F__)
inline constexpr int kMaxRows = 12;  // 24 sums, 2 vectors of weights and 1 of inputs in 32 registers
#else
inline constexpr int kMaxRows = 2;
#endif

// `ahead`: bytes from the weights to those that will be wanted next. They arrive while these are multiplied; the
// processor's own reading ahead is neither as far nor across pages.
template <class T, int rows>
inline __attribute__((always_inline)) void multiply_rows(const T* x, size_t x_stride, const T* weights,
                                                         size_t weight_stride, int num_pairs, std::ptrdiff_t ahead,
                                                         Floats (&sums)[rows][2]) {
  typedef Pair<T> P;
  for (int m = 0; m < rows; ++m) sums[m][0] = sums[m][1] = Floats{};
  for (int k = 0; k < num_pairs; ++k, weights += weight_stride) {
    __builtin_prefetch((const char*)weights + ahead);
    __builtin_prefetch((const char*)weights + ahead + 64);
    const auto left = load_pairs(weights);
    const auto right = load_pairs(weights + kLanes * P::size);
    for (int m = 0; m < rows; ++m) {
      const auto input = P::broadcast(x + m * x_stride + k * P::size);
      sums[m][0] = P::multiply_add(sums[m][0], input, left);
      sums[m][1] = P::multiply_add(sums[m][1], input, right);
    }
  }
}

// Calls block(first_row, std::integral_constant of the number of rows) until all rows are covered.
template <int rows, class Block>
inline void last_rows(int first, int count, Block&& block) {
  if constexpr (rows > 0) {
    if (count == rows) return block(first, std::integral_constant<int, rows>{});
    last_rows<rows - 1>(first, count, block);
  }
}

template <class Block>
inline void for_row_blocks(int num_rows, Block&& block) {
  int first = 0;
  for (; num_rows - first >= kMaxRows; first += kMaxRows) block(first, std::integral_constant<int, kMaxRows>{});
  last_rows<kMaxRows - 1>(first, num_rows - first, block);
}

// done(row, left, right) receives the 32 sums of each row.
template <class T, class Done>
inline void multiply_tile(const T* x, size_t x_stride, int num_rows, const T* weights, size_t weight_stride,
                          int num_pairs, std::ptrdiff_t ahead, Done&& done) {
  for_row_blocks(num_rows, [&](int first, auto rows) {
    Floats sums[rows][2];
    multiply_rows<T, rows>(x + first * x_stride, x_stride, weights, weight_stride, num_pairs, ahead, sums);
    for (int m = 0; m < rows; ++m) done(first + m, sums[m][0], sums[m][1]);
  });
}

}  // namespace millrace::MILLRACE_ISA
