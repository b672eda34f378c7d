// The joint entropies: a blocked matrix product whose rounding depends on K alone, so that H can be recomputed bit
// for bit.

template <class T> constexpr int64_t kPanelColumns = 2 * kLanes<T>;
constexpr int64_t kPanelRows = VRM_PANEL_ROWS;
constexpr int64_t kDepthBlock = 192;  // a column panel of so many steps stays in the first-level cache

template <class T>
void pack_panel(Strided<T> m, int64_t count, int64_t depth, int64_t panel, int64_t height, T* out) {
  const int64_t first = panel * height;
  const int64_t valid = count - first < height ? count - first : height;
  if (m.vertex_stride == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      const T* from = m.data + first + k * m.dim_stride;
      for (int64_t r = 0; r < height; ++r) out[k * height + r] = r < valid ? from[r] : T(0);
    }
    return;
  }
  for (int64_t r = 0; r < height; ++r) {
    const T* from = m.at(first + r);
    if (r < valid) {
      for (int64_t k = 0; k < depth; ++k) out[k * height + r] = from[k * m.dim_stride];
    } else {
      for (int64_t k = 0; k < depth; ++k) out[k * height + r] = T(0);
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
