// Vectors as wide as the instruction set that this file is compiled for, by the compiler's vector
// extensions. Every file that includes it is compiled once per instruction set, in a namespace of
// its own (ISA), so that no function of one set is ever linked in place of another's.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace mlxarch {
namespace ISA {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float floats __attribute__((vector_size(WIDTH * 4)));
typedef int32_t ints __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t words __attribute__((vector_size(WIDTH * 4)));

inline floats load(const float* from) {
  floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline words load(const uint32_t* from) {
  words value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, floats value) {
  std::memcpy(to, &value, sizeof value);
}

inline floats splat(float value) {
  return value - floats{};
}

inline floats to_floats(words value) {
  // As signed integers: no code uses the highest bit, and the conversion is a single instruction
  return __builtin_convertvector((ints)value, floats);
}

// Keep a constant in a register: the compiler would build it again for every row
inline void keep(words& value) {
#if defined(__x86_64__)
  asm volatile("" : "+x"(value));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(value));
#endif
}

// Lane i of the result is lane i + DISTANCE
template <int DISTANCE>
inline floats lower(floats value) {
  ints index;
  for (int i = 0; i < WIDTH; i++) {
    index[i] = (i + DISTANCE) % WIDTH;
  }
  return __builtin_shuffle(value, index);
}

inline float sum(floats value) {
  if constexpr (WIDTH > 8) {
    value += lower<8>(value);
  }
  if constexpr (WIDTH > 4) {
    value += lower<4>(value);
  }
  value += lower<2>(value);
  value += lower<1>(value);
  return value[0];
}

inline floats select(ints condition, floats yes, floats no) {
  return (floats)(((ints)yes & condition) | ((ints)no & ~condition));
}

inline floats max(floats a, floats b) {
  return select(a > b, a, b);
}

inline float max(floats value) {
  float result = value[0];
  for (int i = 1; i < WIDTH; i++) {
    result = value[i] > result ? value[i] : result;
  }
  return result;
}

// e^x with a relative error below 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' expf).
// Below -87.3 the result is 0, above 88.7 infinity; NaN stays NaN.
inline floats exp(floats x) {
  const floats low = splat(-87.33654f), high = splat(88.72283f);
  floats clamped = select(x < low, low, select(x > high, high, x));
  floats n = clamped * 1.44269504f;
  ints whole = __builtin_convertvector(n + select(n < 0.0f, splat(-0.5f), splat(0.5f)), ints);
  floats f = __builtin_convertvector(whole, floats);
  floats r = clamped - f * 0.693359375f;
  r = r + f * 2.12194440e-4f;
  floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors, since n may be 128
  ints half = whole >> 1;
  floats first = (floats)((half + 127) << 23);
  floats second = (floats)((whole - half + 127) << 23);
  floats result = p * first * second;
  result = select(x < low, floats{}, result);
  result = select(x > high, splat(INFINITY), result);
  return select(x == x, result, x);
}

} // namespace ISA
} // namespace mlxarch
