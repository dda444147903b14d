// Sixteen floats at a time, in GCC's vector extensions: one source for every instruction set it is compiled for.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace millrace::MILLRACE_ISA {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
inline constexpr int kLanes = 16;

struct bf16 {
  uint16_t bits;
};

inline Floats splat(float value) { return Floats{} + value; }

inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline Floats load(const bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline Halves to_bf16(Floats values) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)values);
#else
  const Words bits = (Words)values;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Ints is_nan = values != values;
  return __builtin_convertvector((rounded & ~(Words)is_nan) | (0x7fc0u & (Words)is_nan), Halves);
#endif
}

inline void store(bf16* to, Floats values) {
  const Halves halves = to_bf16(values);
  std::memcpy(to, &halves, sizeof halves);
}

template <class T>
inline void store_some(T* to, Floats values, int count) {
  if (count >= kLanes) return store(to, values);
  T all[kLanes];
  store(all, values);
  std::memcpy(to, all, size_t(count) * sizeof(T));
}

template <class T>
inline Floats load_some(const T* from, int count) {
  if (count >= kLanes) return load(from);
  T all[kLanes] = {};
  std::memcpy(all, from, size_t(count) * sizeof(T));
  return load(all);
}

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

template <class T>
inline Floats rounded_to(Floats values);
template <>
inline Floats rounded_to<float>(Floats values) { return values; }
template <>
inline Floats rounded_to<bf16>(Floats values) {
  return (Floats)(__builtin_convertvector(to_bf16(values), Words) << 16);
}

// Sums and maxima in one fixed tree, whatever the compiler does.
inline float sum(Floats values) {
  float lanes[kLanes];
  store(lanes, values);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float largest(Floats values) {
  float lanes[kLanes];
  store(lanes, values);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

// e**x within 2 ulp; exactly 1 at 0, exactly 0 below -87, NaN of NaN (Cephes' polynomial).
inline Floats exp(Floats x) {
  const Floats clamped = x < -87.0f ? splat(-87.0f) : (x > 88.0f ? splat(88.0f) : x);
  const Floats magic = splat(12582912.0f);  // 1.5 x 2**23: adding it rounds to an integer in the low bits
  const Floats shifted = clamped * 1.44269504088896341f + magic;
  const Floats n = shifted - magic;
  Floats r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints exponent = (Ints)shifted << 23;
  const Floats scaled = (Floats)((Ints)p + exponent);
  return x < -87.0f ? Floats{} : (x != x ? x : scaled);
}

inline float exp(float x) { return exp(splat(x))[0]; }

inline Floats silu(Floats x) { return x / (exp(-x) + 1.0f); }

// Two neighbours along the summed dimension travel together in bf16, one in fp32.
template <class T>
struct Pair;

template <>
struct Pair<float> {
  static constexpr int size = 1;
  typedef Floats Packed;
  static Floats broadcast(const float* from) { return splat(*from); }
  static Floats multiply_add(Floats sum, Floats x, Floats weights) { return sum + x * weights; }
};

template <>
struct Pair<bf16> {
  static constexpr int size = 2;
  typedef Words Packed;
  static Words broadcast(const bf16* from) {
    uint32_t both;
    std::memcpy(&both, from, sizeof both);
    return Words{} + both;
  }
  static Floats multiply_add(Floats sum, Words x, Words weights) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)weights);
#else
    sum = sum + (Floats)(x << 16) * (Floats)(weights << 16);
    return sum + (Floats)(x & 0xffff0000u) * (Floats)(weights & 0xffff0000u);
#endif
  }
};

template <class T>
inline typename Pair<T>::Packed load_pairs(const T* from) {
  typename Pair<T>::Packed pairs;
  std::memcpy(&pairs, from, sizeof pairs);
  return pairs;
}

}  // namespace millrace::MILLRACE_ISA
