// Order statistics: integers in the order of the floats, and torch's interpolation between two of them.
#pragma once

#include "block.cuh"

namespace vrm {
namespace cuda {

// Unsigned integers in the order of the floats; x + 0 makes one of both zeros.
__device__ __forceinline__ uint64_t to_key(float x) {
  const uint32_t u = __float_as_uint(x + 0.0f);
  return u >> 31 ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ uint64_t to_key(double x) {
  const uint64_t u = static_cast<uint64_t>(__double_as_longlong(x + 0.0));
  return u >> 63 ? ~u : u | (uint64_t{1} << 63);
}
__device__ __forceinline__ void from_key(uint64_t key, float& x) {
  const uint32_t u = static_cast<uint32_t>(key);
  x = __uint_as_float(u >> 31 ? u & 0x7fffffffu : ~u);
}
__device__ __forceinline__ void from_key(uint64_t key, double& x) {
  x = __longlong_as_double(static_cast<long long>(key >> 63 ? key & ~(uint64_t{1} << 63) : ~key));
}

// torch.lerp, whose product and sum are one rounding.
template <class T> __device__ __forceinline__ T interpolate(T low, T high, T weight) {
  if (weight == T(0)) return low;  // beside an infinity a product would make NaN of it
  const T difference = high - low;
  return weight < T(0.5) ? fma(weight, difference, low) : fma(weight - T(1), difference, high);
}

}  // namespace cuda
}  // namespace vrm
