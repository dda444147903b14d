// One pass over a row of scores: its largest entry, or the token that a Gumbel draw picks.
//
// A draw adds to every score the Gumbel number of (seed, position, token id) and takes the largest sum. The numbers are
// Philox4x32-10's (Salmon et al., SC '11), four tokens to a block. Single precision finds the few tokens that may win;
// they are compared in double, exactly as the reference compares all of them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "step.h"
#include "vector.h"

namespace millrace::MILLRACE_ISA {

// NaN if any score is; the lowest id of equals.
inline void max_of_row(const float* scores, int64_t size, float* best, int64_t* id) {
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Floats top = splat(-std::numeric_limits<float>::infinity());
  Ints where = lane, is_nan{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Floats values = load(scores + i);
    const Ints is_better = values > top;
    top = is_better ? values : top;
    where = is_better ? lane + int32_t(i) : where;
    is_nan |= values != values;
  }
  float best_value = -std::numeric_limits<float>::infinity();
  int64_t best_id = size;
  bool has_nan = false;
  for (int l = 0; l < kLanes; ++l) {
    has_nan |= is_nan[l] != 0;
    if (top[l] > best_value || (top[l] == best_value && where[l] < best_id)) best_value = top[l], best_id = where[l];
  }
  for (; i < size; ++i) {
    has_nan |= scores[i] != scores[i];
    if (scores[i] > best_value) best_value = scores[i], best_id = i;
  }
  *best = has_nan ? std::numeric_limits<float>::quiet_NaN() : best_value;
  *id = best_id < size ? best_id : 0;
}

struct Counter {
  Words words[4];
};

inline void multiply_32(Words a, uint32_t b, Words* high, Words* low) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32(int(b));
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  *low = (Words)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  *high = (Words)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#else
  *low = a * b;
  for (int i = 0; i < kLanes; ++i) (*high)[i] = uint32_t((uint64_t(a[i]) * b) >> 32);
#endif
}

inline Counter philox(Counter c, uint32_t key_low, uint32_t key_high) {
  for (int round = 0; round < 10; ++round) {
    Words high_0, low_0, high_1, low_1;
    multiply_32(c.words[0], 0xD2511F53u, &high_0, &low_0);
    multiply_32(c.words[2], 0xCD9E8D57u, &high_1, &low_1);
    c = {{high_1 ^ c.words[1] ^ key_low, low_1, high_0 ^ c.words[3] ^ key_high, low_0}};
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return c;
}

// Natural logarithm of positive normal numbers within 2 ulp (Cephes' polynomial).
inline Floats log(Floats x) {
  const Words bits = (Words)x;
  Ints exponent = (Ints)(bits >> 23) - 126;
  Floats m = (Floats)((bits & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
  const Ints is_small = m < 0.707106781186547524f;
  exponent += is_small;  // -1 where true
  m = (is_small ? m + m : m) - 1.0f;
  const Floats e = __builtin_convertvector(exponent, Floats);
  const Floats z = m * m;
  Floats p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  Floats y = m * z * p + e * -2.12194440e-4f - 0.5f * z;
  return m + y + e * 0.693359375f;
}

// -log(-log(u)) of u = (word + 1/2) / 2**32, within 0.002: where u is close to 1, -log(u) is 1 - u, known exactly.
inline Floats rough_gumbel(Words word) {
  constexpr float kUnit = 2.3283064365386963e-10f;  // 2**-32
  const Floats from_one = (__builtin_convertvector(~word, Floats) + 0.5f) * kUnit;
  const Floats u = (__builtin_convertvector(word, Floats) + 0.5f) * kUnit;
  const Floats minus_log = from_one < 1e-4f ? from_one : -log(u);
  return -log(minus_log);
}

inline double exact_key(float scaled, uint32_t word) {
  return -std::log(-std::log((double(word) + 0.5) * 2.3283064365386963e-10)) + double(scaled);
}

// The token whose scaled score, (score - best) / temperature, and Gumbel number have the largest sum, among those whose
// scaled score reaches the threshold.
inline int64_t draw_of_row(const DrawRow& row, int64_t size) {
  constexpr int kWords = 4, kBlock = kLanes * kWords;
  constexpr float kMargin = 0.02f;  // ten times the error of the rough numbers
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  const Words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  float top = kNever;
  double best_key = -std::numeric_limits<double>::infinity();
  int64_t best_id = 0;
  alignas(64) float scaled[kBlock], keys[kBlock];
  alignas(64) uint32_t words[kWords][kLanes];
  alignas(64) float gumbels[kWords][kLanes];
  for (int64_t start = 0; start < size; start += kBlock) {
    Counter counter = {{lane + uint32_t(start / kWords), Words{}, Words{} + row.position_low, Words{} + row.position_high}};
    counter = philox(counter, row.seed_low, row.seed_high);
    for (int w = 0; w < kWords; ++w) {
      std::memcpy(words[w], &counter.words[w], sizeof words[w]);
      store(gumbels[w], rough_gumbel(counter.words[w]));
    }
    for (int i = 0; i < kBlock; ++i) keys[i] = gumbels[i % kWords][i / kWords];
    const int count = size - start < kBlock ? int(size - start) : kBlock;
    Floats block_top = splat(kNever);
    for (int i = 0; i < kBlock; i += kLanes) {
      Floats values = splat(kNever);
      if (i < count) {
        values = (load_some(row.scores + start + i, count - i) - row.best) / row.temperature;
        if (count - i < kLanes) values = lane < uint32_t(count - i) ? values : splat(kNever);
      }
      values = values < row.threshold ? splat(kNever) : values;
      store(scaled + i, values);
      const Floats sums = load(keys + i) + values;
      store(keys + i, sums);
      block_top = larger(sums, block_top);
    }
    const float here = largest(block_top);
    if (here < top - kMargin || here == kNever) continue;
    top = here > top ? here : top;
    for (int i = 0; i < count; ++i) {
      if (keys[i] < top - kMargin || keys[i] == kNever) continue;
      const double key = exact_key(scaled[i], words[i % kWords][i / kWords]);
      if (key > best_key) best_key = key, best_id = start + i;
    }
  }
  return best_id;
}

struct Candidate {
  float score;
  int32_t id;
  // Falling score, then rising id.
  bool operator<(const Candidate& other) const { return score > other.score || (score == other.score && id < other.id); }
};

inline constexpr int kChunk = kLanes;

// Chunks of a row of scores, and all of its tokens.
inline size_t top_scratch_bytes(int64_t size) { return size_t(size + size / kChunk + 2) * sizeof(Candidate); }

// The `width` likeliest tokens, width <= size, as scaled scores in order, and the mass, e**scaled, of all tokens that
// reach the threshold. The largest scores of the chunks tell which chunks can hold one of them, without any sort of the
// row.
inline void top_of_row(const DrawRow& row, int64_t size, int64_t width, float* values, int64_t* ids, double* total,
                       void* scratch) {
  Candidate* chunks = static_cast<Candidate*>(scratch);
  const int64_t num_chunks = (size + kChunk - 1) / kChunk;
  Candidate* found = chunks + num_chunks + 1;
  const auto scaled_chunk = [&](int64_t start) {
    const int count = size - start < kChunk ? int(size - start) : kChunk;
    return (load_some(row.scores + start, count) - row.best) / row.temperature;
  };
  double mass = 0;
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int64_t start = chunk * kChunk;
    Floats scaled = scaled_chunk(start);
    for (int64_t i = size - start; i < kChunk; ++i) scaled[i] = -std::numeric_limits<float>::infinity();
    chunks[chunk] = {largest(scaled), int32_t(chunk)};
    mass += sum(scaled < row.threshold ? Floats{} : exp(scaled));
  }
  *total = mass;
  float least = -std::numeric_limits<float>::infinity();
  if (num_chunks > width) {
    std::nth_element(chunks, chunks + width - 1, chunks + num_chunks);
    least = chunks[width - 1].score;
  }
  int64_t num_found = 0;
  for (int64_t c = 0; c < num_chunks; ++c) {
    if (chunks[c].score < least) continue;
    const int64_t start = int64_t(chunks[c].id) * kChunk;
    const Floats scaled = scaled_chunk(start);
    for (int64_t i = 0; i < kChunk && start + i < size; ++i)
      if (scaled[i] >= least) found[num_found++] = {scaled[i], int32_t(start + i)};
  }
  std::partial_sort(found, found + width, found + num_found);
  for (int64_t i = 0; i < width; ++i) values[i] = found[i].score, ids[i] = found[i].id;
}

}  // namespace millrace::MILLRACE_ISA
