// The joint entropies: a blocked matrix product whose rounding depends on K alone, so that H can be recomputed bit
// for bit.

template <class T> constexpr int64_t kPanelColumns = 2 * kLanes<T>;
constexpr int64_t kPanelRows = VRM_PANEL_ROWS;
constexpr int64_t kDepthBlock = 192;  // a column panel of so many steps stays in the first-level cache

template <class T>
void pack_panel(Strided<T> m, int64_t count, int64_t depth, int64_t panel, int64_t height, T* out) {
  const int64_t first = panel * height;
  const int64_t valid = count - first < height ? count - first : height;
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t r0 = 0; r0 < height; r0 += lanes) {
    const int64_t n = valid > r0 ? valid - r0 : 0;  // vertices of this register; those behind the last are zero
    if (m.vertex_stride == 1) {
      for (int64_t k = 0; k < depth; ++k)
        store_part(out + k * height + r0, load_part(m.data + first + r0 + k * m.dim_stride, n, T(0)), height - r0);
      continue;
    }
    for (int64_t k = 0; k < depth; k += lanes) {
      Vec<T> square[lanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < lanes; ++r)
        square[r] = r < n ? load_part(m.at(first + r0 + r) + k, depth - k, T(0)) : Vec<T>{};
      transpose<T>(square);
      for (int64_t d = 0; d < lanes && k + d < depth; ++d)
        store_part(out + (k + d) * height + r0, square[d], height - r0);
    }
  }
}

// c [kPanelRows][2 registers] = (first ? 0 : c) - sum_k a[k][row] b[k][column]. The sum of a block is added to c as a
// whole: a running sum over tens of thousands of classes would lose digits that decide which edges are kept.
template <class T>
VRM_INLINE void multiply_panels(const T* __restrict a, const T* __restrict b, int64_t depth, bool first,
                                T* __restrict c, int64_t ld) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> acc[kPanelRows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<T> b0 = load(b), b1 = load(b + lanes);
#pragma GCC unroll 16
    for (int r = 0; r < kPanelRows; ++r) {
      const Vec<T> x = splat<T>(a[r]);
      acc[r][0] -= x * b0;
      acc[r][1] -= x * b1;
    }
    a += kPanelRows;
    b += 2 * lanes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kPanelRows; ++r) {
    T* to = c + r * ld;
    store(to, first ? acc[r][0] : load(to) + acc[r][0]);
    store(to + lanes, first ? acc[r][1] : load(to + lanes) + acc[r][1]);
  }
}

template <class T>
void entropy_rows(const Entropy<T>& e, int64_t row_panel_begin, int64_t row_panel_end, int64_t column_panel_begin,
                  int64_t column_panel_end, T* h, int64_t ld) {
  constexpr int64_t height = kPanelRows, width = kPanelColumns<T>;
  for (int64_t k = 0; k < e.depth; k += kDepthBlock) {
    const int64_t depth = e.depth - k < kDepthBlock ? e.depth - k : kDepthBlock;
    for (int64_t q = column_panel_begin; q < column_panel_end; ++q) {
      const T* b = e.log_panels + (q * e.depth + k) * width;
      for (int64_t p = row_panel_begin; p < row_panel_end; ++p) {
        const T* a = e.probs_panels + (p * e.depth + k) * height;
        multiply_panels<T>(a, b, depth, k == 0,
                           h + (p - row_panel_begin) * height * ld + (q - column_panel_begin) * width, ld);
      }
    }
  }
}
