// What the kernels ask of torch: its threads, its matrix products, and how it rounds an interpolation. The kernels see
// pointers and sizes only; what is torch's lies behind these functions, in runtime.cpp.
#pragma once

#include <cstdint>

namespace vrm {

int64_t num_threads();  // torch.get_num_threads()

// Calls member(context, rank, size) once on each of `size` threads of torch's own, all of which run at the same time.
// `size` is `threads`, or less where torch gives less: 1 inside of another parallel region. Member 0 is the calling
// thread.
using Member = void (*)(void* context, int64_t rank, int64_t size);
void run_members(int64_t threads, Member member, void* context);

template <class T> struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride;
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

// out = alpha a b, added to out if `accumulate`: torch's own product, on its threads, where it has one to call.
bool can_multiply();
template <class T>
void multiply(const Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b, double alpha, bool accumulate);

// Whether torch.lerp multiplies and adds in one rounding here.
template <class T> bool lerp_is_fused();

}  // namespace vrm
