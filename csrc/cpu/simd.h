// One vector register of T, for the instruction set that the including translation unit is compiled for.
//
// GCC and Clang vector extensions: the same source gives AVX-512, AVX2 and the portable 16-byte path. The including
// file defines VRM_VECTOR_BYTES and sets its target by a pragma *after* its standard includes, so that no inline function of
// the standard library is compiled for an instruction set that the machine may lack.
#pragma once

#include <cstdint>

#define VRM_INLINE inline __attribute__((always_inline))
#define VRM_STAGE __attribute__((noinline))  // called once a tile: kept apart so that a profiler can tell the stages

namespace vrm {
namespace VRM_ISA_NAMESPACE {

template <class T> struct VecOf;
template <> struct VecOf<float> {
  typedef float type __attribute__((vector_size(VRM_VECTOR_BYTES), aligned(4), may_alias));
};
template <> struct VecOf<double> {
  typedef double type __attribute__((vector_size(VRM_VECTOR_BYTES), aligned(8), may_alias));
};
template <class T> using Vec = typename VecOf<T>::type;
template <class T> constexpr int kLanes = VRM_VECTOR_BYTES / sizeof(T);

template <class T> VRM_INLINE Vec<T> load(const T* p) { return *reinterpret_cast<const Vec<T>*>(p); }
template <class T> VRM_INLINE void store(T* p, Vec<T> v) { *reinterpret_cast<Vec<T>*>(p) = v; }
template <class T> VRM_INLINE Vec<T> splat(T x) { return x - Vec<T>{}; }
template <class T> VRM_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) { return a > b ? a : b; }

// Integers of T's size.
template <class T> struct IntOf {
  typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type type
      __attribute__((vector_size(VRM_VECTOR_BYTES)));
};
template <class T> using VecInt = typename IntOf<T>::type;

template <class T> VRM_INLINE Vec<T> magnitude(Vec<T> a) {  // without the sign bit
  return (Vec<T>)((VecInt<T>)a & ~(VecInt<T>)splat<T>(T(-0.0)));
}

VRM_INLINE Vec<float> square_root(Vec<float> v) {
#if VRM_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_sqrt_ps((__m512)v);
#elif VRM_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_sqrt_ps((__m256)v);
#else
  for (int k = 0; k < kLanes<float>; ++k) v[k] = __builtin_sqrtf(v[k]);
  return v;
#endif
}
VRM_INLINE Vec<double> square_root(Vec<double> v) {
#if VRM_VECTOR_BYTES == 64
  return (Vec<double>)_mm512_sqrt_pd((__m512d)v);
#elif VRM_VECTOR_BYTES == 32
  return (Vec<double>)_mm256_sqrt_pd((__m256d)v);
#else
  for (int k = 0; k < kLanes<double>; ++k) v[k] = __builtin_sqrt(v[k]);
  return v;
#endif
}

// Element k of the result is element k ^ D.
template <class T, int D, int... Lane> VRM_INLINE Vec<T> swap_lanes(Vec<T> v, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(v, v, (Lane ^ D)...);
}
// Combines all elements, in halves: one after the other, each would wait for the one before.
template <class T, int D = kLanes<T> / 2, class Combine> VRM_INLINE T fold(Vec<T> v, const Combine& combine) {
  if constexpr (D == 0) {
    return v[0];
  } else {
    return fold<T, D / 2>(combine(v, swap_lanes<T, D>(v, std::make_integer_sequence<int, kLanes<T>>())), combine);
  }
}
template <class T> VRM_INLINE T horizontal_sum(Vec<T> v) {
  return fold<T>(v, [](Vec<T> a, Vec<T> b) { return a + b; });
}
template <class T> VRM_INLINE T horizontal_max(Vec<T> v) {
  return fold<T>(v, [](Vec<T> a, Vec<T> b) { return maximum<T>(a, b); });
}

template <class Mask> VRM_INLINE bool none(Mask m) {
#if VRM_VECTOR_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) == 0;
#elif VRM_VECTOR_BYTES == 32
  return _mm256_testz_si256((__m256i)m, (__m256i)m) != 0;
#else
  int64_t words[VRM_VECTOR_BYTES / 8], any = 0;
  __builtin_memcpy(words, &m, sizeof(m));
  for (int64_t word : words) any |= word;
  return any == 0;
#endif
}

// The sums of four registers, into out[0..3]: halve the registers pairwise instead of reducing each alone.
VRM_INLINE void sum4(Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d, float* out) {
#if VRM_VECTOR_BYTES == 64
  const auto ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const auto cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  __builtin_shufflevector(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const auto s = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                 __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  const auto t = s + __builtin_shufflevector(s, s, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  const auto u = t + __builtin_shufflevector(t, t, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  const auto sums = __builtin_shufflevector(u, u, 0, 4, 8, 12);
  __builtin_memcpy(out, &sums, sizeof(sums));
#elif VRM_VECTOR_BYTES == 32
  const auto ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
                  __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  const auto cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 8, 9, 10, 11) +
                  __builtin_shufflevector(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
  const auto s = __builtin_shufflevector(ab, cd, 0, 1, 4, 5, 8, 9, 12, 13) +
                 __builtin_shufflevector(ab, cd, 2, 3, 6, 7, 10, 11, 14, 15);
  const auto t = s + __builtin_shufflevector(s, s, 1, 0, 3, 2, 5, 4, 7, 6);
  const auto sums = __builtin_shufflevector(t, t, 0, 2, 4, 6);
  __builtin_memcpy(out, &sums, sizeof(sums));
#else
  out[0] = horizontal_sum<float>(a), out[1] = horizontal_sum<float>(b);
  out[2] = horizontal_sum<float>(c), out[3] = horizontal_sum<float>(d);
#endif
}
VRM_INLINE void sum4(Vec<double> a, Vec<double> b, Vec<double> c, Vec<double> d, double* out) {
  out[0] = horizontal_sum<double>(a), out[1] = horizontal_sum<double>(b);
  out[2] = horizontal_sum<double>(c), out[3] = horizontal_sum<double>(d);
}

}  // namespace VRM_ISA_NAMESPACE
}  // namespace vrm
