// The caller's matrices, of any dtype and strides.
#pragma once

#include "block.cuh"
#include "problem.h"

#include <cuda_fp16.h>

namespace vrm {
namespace cuda {

template <class T> __device__ __forceinline__ T element(const Input& x, int64_t row, int64_t column) {
  const int64_t at = row * x.row_stride + column * x.column_stride;
  switch (x.dtype) {
    case Dtype::float64: return static_cast<T>(static_cast<const double*>(x.data)[at]);
    case Dtype::float32: return static_cast<T>(static_cast<const float*>(x.data)[at]);
    case Dtype::bfloat16:
      return static_cast<T>(__uint_as_float(static_cast<uint32_t>(static_cast<const uint16_t*>(x.data)[at]) << 16));
    case Dtype::float16:
      return static_cast<T>(__half2float(__ushort_as_half(static_cast<const uint16_t*>(x.data)[at])));
  }
  return T(0);
}

// A row.
template <class T> struct Vector {
  const Input& x;
  int64_t row;

  __device__ __forceinline__ T operator[](int64_t k) const { return element<T>(x, row, k); }
};

// Of a vertex in the dense form, which has no copies.
template <class T>
__device__ __forceinline__ Vector<T> vector_of(const Graph<T>& g, const Input (&views)[2], int64_t v) {
  return v < g.split ? Vector<T>{views[0], v} : Vector<T>{views[1], v - g.split};
}
template <class T> __device__ __forceinline__ Vector<T> student_of(const Graph<T>& g, int64_t v) {
  return vector_of(g, g.student_views, v);
}
template <class T> __device__ __forceinline__ Vector<T> teacher_of(const Graph<T>& g, int64_t v) {
  return vector_of(g, g.teacher_views, v);
}

}  // namespace cuda
}  // namespace vrm
