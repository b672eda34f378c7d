// float16 on the host, rounded to nearest even as a GPU does it.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, digits = x.bits & 0x3ff;
  const float size = exponent == 31  ? (digits == 0 ? INFINITY : NAN)
                     : exponent == 0 ? std::ldexp(static_cast<float>(digits), -24)
                                     : std::ldexp(static_cast<float>(digits | 0x400), exponent - 25);
  return x.bits >> 15 != 0 ? -size : size;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size != size) return {0x7fff};
  if (size == 0.0f) return {sign};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;  // of the spacing
  std::frexp(size, &exponent);
  exponent = exponent - 11 > -24 ? exponent - 11 : -24;
  const auto digits = static_cast<int>(std::nearbyint(std::ldexp(size, -exponent)));
  // Digits that were rounded up to the next power of two carry into the exponent by themselves.
  return {static_cast<uint16_t>(sign | (digits + ((exponent + 24) << 10)))};
}
