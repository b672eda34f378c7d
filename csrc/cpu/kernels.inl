// The CPU kernels, written once for every instruction set: included by kernels_<isa>.cpp, which define VRM_ISA_NAMESPACE,
// VRM_VECTOR_BYTES, VRM_PANEL_ROWS and the compilation target.

#include "graph.h"
#include "simd.h"

namespace vrm {
namespace VRM_ISA_NAMESPACE {

// ---- entropy: a blocked matrix product whose rounding depends on K alone, so that H can be recomputed bit for bit ------

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

// ---- centring ----------------------------------------------------------------------------------------------------------

// Adds every vertex to sums[dim], dims [begin, end); false if an element there is not finite.
template <class T> bool sum_vertices(Strided<T> m, int64_t count, int64_t begin, int64_t end, T* sums) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> poison{};  // x - x is 0, or NaN
  T tail = 0;
  if (m.vertex_stride == 1) {
    for (int64_t k = begin; k < end; ++k) {
      const T* x = m.data + k * m.dim_stride;
      Vec<T> sum{};
      T rest = 0;
      int64_t v = 0;
      for (; v + lanes <= count; v += lanes) {
        const Vec<T> value = load(x + v);
        sum += value;
        poison += value - value;
      }
      for (; v < count; ++v) rest += x[v], tail += x[v] - x[v];
      sums[k] += horizontal_sum<T>(sum) + rest;
    }
  } else {
    for (int64_t v = 0; v < count; ++v) {
      const T* x = m.at(v);
      int64_t k = begin;
      if (m.dim_stride == 1)
        for (; k + lanes <= end; k += lanes) {
          const Vec<T> value = load(x + k);
          store(sums + k, load(sums + k) + value);
          poison += value - value;
        }
      for (; k < end; ++k) {
        const T value = x[k * m.dim_stride];
        sums[k] += value;
        tail += value - value;
      }
    }
  }
  return horizontal_sum<T>(poison) + tail == T(0);
}

template <class T> double spread(Strided<T> m, int64_t count, int64_t step, int64_t dims, const T* center) {
  double sum = 0;
  for (int64_t v = 0; v < count; v += step)
    for (int64_t k = 0; k < dims; ++k) {
      const double x = static_cast<double>(m.at(v)[k * m.dim_stride]) - static_cast<double>(center[k]);
      sum += x * x;
    }
  return sum;
}

// ---- packing -----------------------------------------------------------------------------------------------------------

template <class T>
VRM_INLINE void pack_chunk(const Graph<T>& g, const Side<T>& side, int64_t c, int64_t begin, int64_t end) {
  const int64_t width = g.chunks.width_of(c), dims = g.chunks.dims_of(c), k0 = g.chunks.begin(c);
  const T *cs = g.center_s + k0, *ct = g.center_t + k0, scale = g.student_scale;
  T* out = const_cast<T*>(side.vectors(g.chunks, c, begin));
  if (side.student.dim_stride == 1 && side.teacher.dim_stride == 1) {
    for (int64_t v = begin; v < end; ++v, out += 3 * width) {
      const T *s = side.student.at(v) + k0, *t = side.teacher.at(v) + k0;
      for (int64_t k = 0; k < dims; ++k) {
        out[k] = scale * (s[k] - cs[k]);
        out[width + k] = t[k] - ct[k];
        // Student minus teacher first: exact where they have nearly converged.
        out[2 * width + k] = (scale * s[k] - t[k]) - (scale * cs[k] - ct[k]);
      }
    }
  } else {
    const int64_t vs = side.student.vertex_stride, vt = side.teacher.vertex_stride;
    for (int64_t k = 0; k < dims; ++k) {
      const T* s = side.student.at(begin) + (k0 + k) * side.student.dim_stride;
      const T* t = side.teacher.at(begin) + (k0 + k) * side.teacher.dim_stride;
      for (int64_t v = 0; v < end - begin; ++v) {
        T* to = out + v * 3 * width + k;
        to[0] = scale * (s[v * vs] - cs[k]);
        to[width] = t[v * vt] - ct[k];
        to[2 * width] = (scale * s[v * vs] - t[v * vt]) - (scale * cs[k] - ct[k]);
      }
    }
  }
  out = const_cast<T*>(side.vectors(g.chunks, c, begin));
  for (int64_t v = begin; v < end; ++v, out += width)
    for (int part = 0; part < 3; ++part, out += part < 3 ? width : 0)
      for (int64_t k = dims; k < width; ++k) out[k] = T(0);
}

template <class T> void pack_side(const Graph<T>& g, const Side<T>& side, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<T>, group = 16;
  for (int64_t v0 = begin; v0 < end; v0 += group) {
    const int64_t v1 = v0 + group < end ? v0 + group : end;
    for (int64_t v = v0; v < v1; ++v) {
      side.square_s[v] = side.square_t[v] = side.square_w[v] = side.reach_s[v] = side.reach_t[v] = T(0);
      side.beta_sum[v] = side.gamma_sum[v] = T(0);
    }
    for (int64_t c = 0; c < g.chunks.count; ++c) {
      pack_chunk(g, side, c, v0, v1);
      const int64_t width = g.chunks.width_of(c);
      for (int64_t v = v0; v < v1; ++v) {
        const T* x = side.vectors(g.chunks, c, v);
        Vec<T> s2{}, t2{}, w2{}, sm{}, tm{};
        for (int64_t k = 0; k < width; k += lanes) {
          const Vec<T> s = load(x + k), t = load(x + width + k), w = load(x + 2 * width + k);
          s2 += s * s, t2 += t * t, w2 += w * w;
          sm = maximum<T>(sm, magnitude<T>(s)), tm = maximum<T>(tm, magnitude<T>(t));
        }
        T sums[4];
        sum4(s2, t2, w2, w2, sums);
        side.square_s[v] += sums[0], side.square_t[v] += sums[1], side.square_w[v] += sums[2];
        const T ms = horizontal_max<T>(sm), mt = horizontal_max<T>(tm);
        if (ms > side.reach_s[v]) side.reach_s[v] = ms;
        if (mt > side.reach_t[v]) side.reach_t[v] = mt;
        if (side.grad != nullptr) {
          T* grad = side.grads(g.chunks, c, v);
          for (int64_t k = 0; k < width; k += lanes) store(grad + k, Vec<T>{});
        }
      }
    }
  }
}

template <class T>
void unpack_grad(const Graph<T>& g, const Side<T>& side, int64_t begin, int64_t end, T* out, int64_t vertex_stride,
                 int64_t dim_stride, bool accumulate) {
  constexpr int64_t group = 16, most = kChunkBytes / sizeof(T);
  T rows[group][most];
  for (int64_t v0 = begin; v0 < end; v0 += group) {
    const int64_t n = v0 + group < end ? group : end - v0;
    for (int64_t c = 0; c < g.chunks.count; ++c) {
      const int64_t width = g.chunks.width_of(c), dims = g.chunks.dims_of(c), k0 = g.chunks.begin(c);
      for (int64_t v = 0; v < n; ++v) {
        const T *x = side.vectors(g.chunks, c, v0 + v), *grad = side.grads(g.chunks, c, v0 + v);
        const T beta = side.beta_sum[v0 + v], gamma = side.gamma_sum[v0 + v];
        for (int64_t k = 0; k < dims; ++k) rows[v][k] = grad[k] + (beta * x[2 * width + k] - gamma * x[k]);
      }
      T* to = out + v0 * vertex_stride + k0 * dim_stride;
      if (dim_stride == 1) {
        for (int64_t v = 0; v < n; ++v)
          for (int64_t k = 0; k < dims; ++k)
            to[v * vertex_stride + k] = accumulate ? to[v * vertex_stride + k] + rows[v][k] : rows[v][k];
      } else {
        for (int64_t k = 0; k < dims; ++k)
          for (int64_t v = 0; v < n; ++v) {
            T& place = to[v * vertex_stride + k * dim_stride];
            place = accumulate ? place + rows[v][k] : rows[v][k];
          }
      }
    }
  }
}

// ---- edges -------------------------------------------------------------------------------------------------------------

// The kept edges of one tile, row by row, and what is known of each.
template <class T> struct Tile {
  int64_t row_begin, rows, count, n_literal;
  int32_t row_start[kTileRows + 1];
  int32_t column_start[kMaxTileColumns + 1];
  int32_t *row, *column, *literal, *by_column_row;
  T *dot_s, *dot_t, *dot_w;  // three arrays of the dot products ...
  T *beta, *gamma;           // ... and the coefficients they give, of the gradient
  T *by_column_beta, *by_column_gamma;
  T* partial;                // [edge][3][register]: dot products between two chunks
};

template <class T> VRM_INLINE Tile<T> make_tile(Scratch scratch) {
  constexpr int64_t edges = kTileRows * kMaxTileColumns + 64;
  Tile<T> tile;
  char* p = scratch.data;
  const auto take = [&p](int64_t bytes) {
    char* at = p;
    p += (bytes + kAlignBytes - 1) / kAlignBytes * kAlignBytes;
    return at;
  };
  for (T** array : {&tile.dot_s, &tile.dot_t, &tile.dot_w, &tile.beta, &tile.gamma, &tile.by_column_beta,
                    &tile.by_column_gamma})
    *array = reinterpret_cast<T*>(take(edges * sizeof(T)));
  for (int32_t** array : {&tile.row, &tile.column, &tile.literal, &tile.by_column_row})
    *array = reinterpret_cast<int32_t*>(take(edges * sizeof(int32_t)));
  tile.partial = reinterpret_cast<T*>(take(3 * edges * kAlignBytes));
  return tile;
}

// Appends the columns of [begin, end) that pass to tile.column.
template <class T>
VRM_INLINE int64_t compress(const T* h, int64_t begin, int64_t end, T threshold, int32_t* column, int64_t n) {
#if VRM_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __m512 limit = _mm512_set1_ps(threshold);
    __m512i index =
        _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(begin)),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (int64_t j = begin; j < end; j += 16) {
      const int64_t left = end - j;
      const __mmask16 valid = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      const __m512 x = _mm512_maskz_loadu_ps(valid, h + (j - begin));
      const __mmask16 kept = _mm512_mask_cmp_ps_mask(valid, x, limit, _CMP_LE_OQ);
      _mm512_storeu_si512(column + n, _mm512_maskz_compress_epi32(kept, index));
      n += __builtin_popcount(kept);
      index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
    }
    return n;
  }
#endif
  for (int64_t j = begin; j < end; ++j) {
    column[n] = static_cast<int32_t>(j);
    n += h[j - begin] <= threshold;
  }
  return n;
}

template <class T>
VRM_STAGE void list_edges(const Graph<T>& g, const Block<T>& block, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                           Tile<T>& tile) {
  tile.row_begin = r0;
  tile.rows = r1 - r0;
  int64_t n = 0;
  for (int64_t i = r0; i < r1; ++i) {
    tile.row_start[i - r0] = static_cast<int32_t>(n);
    const int64_t first = n;
    if (block.entropy != nullptr) {
      const T* h = block.entropy + (i - block.row_begin) * block.entropy_stride + (c0 - block.column_begin);
      n = compress(h, c0, c1, g.threshold, tile.column, n);
    } else {
      for (int64_t j = c0; j < c1; ++j) {
        tile.column[n] = static_cast<int32_t>(j);
        n += !(g.exclude_self && i == j);
      }
    }
    for (int64_t e = first; e < n; ++e) tile.row[e] = static_cast<int32_t>(i);
  }
  tile.row_start[tile.rows] = static_cast<int32_t>(n);
  tile.count = n;
  for (int64_t e = n; e < n + kLanes<T>; ++e) tile.row[e] = tile.column[e] = 0;  // so that whole registers are valid
}

// The three dot products of NE edges of one row over one chunk.
template <class T, int NE>
VRM_INLINE void dot_products(const Graph<T>& g, const T* a, int64_t c, int64_t e, Tile<T>& tile) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t width = g.chunks.width_of(c);
  const T* b[NE];
  Vec<T> s[4], t[4], w[4];
  T* partial = tile.partial + e * 3 * lanes;
#pragma GCC unroll 4
  for (int k = 0; k < NE; ++k) b[k] = g.b.vectors(g.chunks, c, tile.column[e + k]);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const bool resume = c > 0 && k < NE;
    s[k] = resume ? load(partial + (3 * k) * lanes) : Vec<T>{};
    t[k] = resume ? load(partial + (3 * k + 1) * lanes) : Vec<T>{};
    w[k] = resume ? load(partial + (3 * k + 2) * lanes) : Vec<T>{};
  }
  for (int64_t d = 0; d < width; d += lanes) {
    const Vec<T> as = load(a + d), at = load(a + width + d), aw = load(a + 2 * width + d);
#pragma GCC unroll 4
    for (int k = 0; k < NE; ++k) {
      s[k] += as * load(b[k] + d);
      t[k] += at * load(b[k] + width + d);
      w[k] += aw * load(b[k] + 2 * width + d);
    }
  }
  if (c + 1 < g.chunks.count) {
#pragma GCC unroll 4
    for (int k = 0; k < NE; ++k) {
      store(partial + (3 * k) * lanes, s[k]);
      store(partial + (3 * k + 1) * lanes, t[k]);
      store(partial + (3 * k + 2) * lanes, w[k]);
    }
  } else {  // writes four; the surplus is overwritten by the next edges
    sum4(s[0], s[1], s[2], s[3], tile.dot_s + e);
    sum4(t[0], t[1], t[2], t[3], tile.dot_t + e);
    sum4(w[0], w[1], w[2], w[3], tile.dot_w + e);
  }
}

// The same with 32 registers: the three vectors of a row, NV registers each, stay in them for all of the row's edges.
template <class T, int NV> VRM_INLINE void measure_rows(const Graph<T>& g, int64_t c, Tile<T>& tile) {
  constexpr int64_t lanes = kLanes<T>, width = NV * lanes;
  const bool first = c == 0, last = c + 1 == g.chunks.count;
  const T* vectors = g.b.vectors(g.chunks, c, 0);
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t end = tile.row_start[i + 1];
    if (tile.row_start[i] == end) continue;
    const T* x = g.a.vectors(g.chunks, c, tile.row_begin + i);
    Vec<T> a[3][NV];
#pragma GCC unroll 3
    for (int part = 0; part < 3; ++part)
#pragma GCC unroll 8
      for (int k = 0; k < NV; ++k) a[part][k] = load(x + part * width + k * lanes);
    // Dot products of NE edges, interleaved so that no sum waits for itself.
    const auto dots = [&]<int NE>(int64_t e, Vec<T>(&sum)[3][4]) __attribute__((always_inline)) {
      const T* b[NE];
#pragma GCC unroll 4
      for (int n = 0; n < NE; ++n) b[n] = vectors + 3 * width * tile.column[e + n];
#pragma GCC unroll 8
      for (int k = 0; k < NV; ++k)
#pragma GCC unroll 3
        for (int part = 0; part < 3; ++part)
#pragma GCC unroll 4
          for (int n = 0; n < NE; ++n) sum[part][n] += a[part][k] * load(b[n] + part * width + k * lanes);
    };
    const auto resume = [&](int64_t e, int part) {
      return first ? Vec<T>{} : load(tile.partial + (3 * e + part) * lanes);
    };
    // Past the row's end are vertices that exist, and results that the next row overwrites.
    if (!last) {
      constexpr int NE = 2;
      for (int64_t e = tile.row_start[i]; e < end; e += NE) {
        Vec<T> sum[3][4];
#pragma GCC unroll 3
        for (int part = 0; part < 3; ++part)
#pragma GCC unroll 4
          for (int n = 0; n < NE; ++n) sum[part][n] = resume(e + n, part);
        dots.template operator()<NE>(e, sum);
#pragma GCC unroll 4
        for (int n = 0; n < NE; ++n) {
          if (e + n >= end) break;  // the next row's first edge may hold its sums already
#pragma GCC unroll 3
          for (int part = 0; part < 3; ++part) store(tile.partial + (3 * (e + n) + part) * lanes, sum[part][n]);
        }
      }
      continue;
    }
    for (int64_t e = tile.row_start[i]; e < end; e += 4) {
      Vec<T> sum[3][4];
#pragma GCC unroll 3
      for (int part = 0; part < 3; ++part)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) sum[part][n] = resume(e + n, part);
      dots.template operator()<4>(e, sum);
      sum4(sum[0][0], sum[0][1], sum[0][2], sum[0][3], tile.dot_s + e);
      sum4(sum[1][0], sum[1][1], sum[1][2], sum[1][3], tile.dot_t + e);
      sum4(sum[2][0], sum[2][1], sum[2][2], sum[2][3], tile.dot_w + e);
    }
  }
}

template <class T> VRM_STAGE void measure_edges(const Graph<T>& g, Tile<T>& tile) {
  for (int64_t c = 0; c < g.chunks.count; ++c) {
    if (VRM_VECTOR_BYTES == 64) {
      switch (g.chunks.width_of(c) / kLanes<T>) {
        case 8: measure_rows<T, 8>(g, c, tile); break;
        case 7: measure_rows<T, 7>(g, c, tile); break;
        case 6: measure_rows<T, 6>(g, c, tile); break;
        case 5: measure_rows<T, 5>(g, c, tile); break;
        case 4: measure_rows<T, 4>(g, c, tile); break;
        case 3: measure_rows<T, 3>(g, c, tile); break;
        case 2: measure_rows<T, 2>(g, c, tile); break;
        default: measure_rows<T, 1>(g, c, tile); break;
      }
      continue;
    }
    for (int64_t i = 0; i < tile.rows; ++i) {
      const T* a = g.a.vectors(g.chunks, c, tile.row_begin + i);
      int64_t e = tile.row_start[i];
      const int64_t end = tile.row_start[i + 1];
      for (; e + 4 <= end; e += 4) dot_products<T, 4>(g, a, c, e, tile);
      switch (end - e) {
        case 3: dot_products<T, 3>(g, a, c, e, tile); break;
        case 2: dot_products<T, 2>(g, a, c, e, tile); break;
        case 1: dot_products<T, 1>(g, a, c, e, tile); break;
        default: break;
      }
    }
  }
}

// Coefficients of every edge of the tile, vectorised over the edges, and the sum of their losses. Literal edges are
// listed in tile.literal and get none.
template <class T> VRM_STAGE double weigh_edges(const Graph<T>& g, Tile<T>& tile) {
  constexpr int64_t lanes = kLanes<T>;
  const T scale = static_cast<T>(g.scale);
  for (int64_t e = tile.count; e % lanes != 0; ++e) tile.dot_s[e] = tile.dot_t[e] = tile.dot_w[e] = T(0);
  Vec<T> total{};
  tile.n_literal = 0;
  for (int64_t e = 0; e < tile.count; e += lanes) {
    const int32_t *i = tile.row + e, *j = tile.column + e;
    const auto both = [&](const T* a, const T* b) { return gather(a, i) + gather(b, j); };
    const EdgeInput<Vec<T>> input = {load(tile.dot_s + e),
                                     load(tile.dot_t + e),
                                     load(tile.dot_w + e),
                                     both(g.a.square_s, g.b.square_s),
                                     both(g.a.square_t, g.b.square_t),
                                     both(g.a.square_w, g.b.square_w),
                                     both(g.a.reach_s, g.b.reach_s),
                                     both(g.a.reach_t, g.b.reach_t)};
    const auto terms = quadratic_edge(input, g.rule, [](Vec<T> v) { return square_root(v); });
    const auto literal = g.literal_only ? terms.literal | -1 : terms.literal;
    const Vec<T> zero{};
    store(tile.beta + e, literal ? zero : terms.beta * scale);
    store(tile.gamma + e, literal ? zero : terms.gamma * scale);
    const int64_t valid = tile.count - e;
    if (valid >= lanes) {
      total += literal ? zero : terms.loss;
    } else {
      for (int k = 0; k < valid; ++k) total[k] += literal[k] ? T(0) : terms.loss[k];
    }
    if (!none(literal))
      for (int k = 0; k < lanes && k < valid; ++k) {
        tile.literal[tile.n_literal] = static_cast<int32_t>(e + k);
        tile.n_literal += literal[k] != 0;
      }
  }
  return static_cast<double>(horizontal_sum<T>(total));
}

// The tile's edges again, column by column.
template <class T> VRM_INLINE void transpose_edges(int64_t c0, int64_t columns, Tile<T>& tile) {
  int32_t* start = tile.column_start;
  for (int64_t j = 0; j <= columns; ++j) start[j] = 0;
  for (int64_t e = 0; e < tile.count; ++e) ++start[tile.column[e] - c0 + 1];
  for (int64_t j = 0; j < columns; ++j) start[j + 1] += start[j];
  for (int64_t e = 0; e < tile.count; ++e) {
    const int32_t at = start[tile.column[e] - c0]++;
    tile.by_column_row[at] = tile.row[e];
    tile.by_column_beta[at] = tile.beta[e];
    tile.by_column_gamma[at] = tile.gamma[e];
  }
  for (int64_t j = columns; j > 0; --j) start[j] = start[j - 1];
  start[0] = 0;
}

// The edges of consecutive vertices: those of vertex first + k are start[k] ... start[k + 1].
template <class T> struct EdgeList {
  int64_t first, vertices;
  const int32_t* start;
  const int32_t* other;  // the vertex on the other side
  const T *beta, *gamma;
};

// grad_v += sum over its edges of gamma x_other - beta residual_other, NV registers of a chunk: in registers throughout,
// because stores between the loads would stall them.
template <class T, int NV>
VRM_INLINE void add_neighbours(const Graph<T>& g, const Side<T>& own, const Side<T>& other, int64_t c, int64_t offset,
                               const EdgeList<T>& list) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t width = g.chunks.width_of(c);
  const bool first = c == 0 && offset == 0;
  const T* vectors = other.vectors(g.chunks, c, 0) + offset;
  T* grads = own.grads(g.chunks, c, list.first) + offset;
  for (int64_t v = 0; v < list.vertices; ++v, grads += width) {
    const int64_t end = list.start[v + 1];
    if (list.start[v] == end) continue;
    Vec<T> sum[NV], beta_sum{}, gamma_sum{};
#pragma GCC unroll 8
    for (int k = 0; k < NV; ++k) sum[k] = load(grads + k * lanes);
    for (int64_t e = list.start[v]; e < end; ++e) {
      const Vec<T> beta = splat<T>(list.beta[e]), gamma = splat<T>(list.gamma[e]);
      const T *x = vectors + 3 * width * list.other[e], *residual = x + 2 * width;
      asm("" : "+r"(residual));  // an address register of its own, not one for every load
#pragma GCC unroll 8
      for (int k = 0; k < NV; ++k) sum[k] += gamma * load(x + k * lanes);
#pragma GCC unroll 8
      for (int k = 0; k < NV; ++k) sum[k] -= beta * load(residual + k * lanes);
      beta_sum += beta;
      gamma_sum += gamma;
    }
#pragma GCC unroll 8
    for (int k = 0; k < NV; ++k) store(grads + k * lanes, sum[k]);
    if (!first) continue;
    own.beta_sum[list.first + v] += beta_sum[0];
    own.gamma_sum[list.first + v] += gamma_sum[0];
  }
}

template <class T>
VRM_STAGE void add_gradients(const Graph<T>& g, const Side<T>& own, const Side<T>& other, const EdgeList<T>& list) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t c = 0; c < g.chunks.count; ++c) {
    const int64_t registers = g.chunks.width_of(c) / lanes;
    int64_t k = 0;
    for (; k + 8 <= registers; k += 8) add_neighbours<T, 8>(g, own, other, c, k * lanes, list);
    switch (registers - k) {
      case 7: add_neighbours<T, 7>(g, own, other, c, k * lanes, list); break;
      case 6: add_neighbours<T, 6>(g, own, other, c, k * lanes, list); break;
      case 5: add_neighbours<T, 5>(g, own, other, c, k * lanes, list); break;
      case 4: add_neighbours<T, 4>(g, own, other, c, k * lanes, list); break;
      case 3: add_neighbours<T, 3>(g, own, other, c, k * lanes, list); break;
      case 2: add_neighbours<T, 2>(g, own, other, c, k * lanes, list); break;
      case 1: add_neighbours<T, 1>(g, own, other, c, k * lanes, list); break;
      default: break;
    }
  }
}

// The component-wise formula of one edge. `room` holds two vectors of D padded.
template <class T> double literal_edge(const Graph<T>& g, int64_t i, int64_t j, T* room) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t padded = g.chunks.lanes_padded;
  T *ds = room, *dt = room + padded;
  Vec<T> s2{}, t2{};
  for (int64_t c = 0; c < g.chunks.count; ++c) {
    const int64_t width = g.chunks.width_of(c), k0 = g.chunks.begin(c);
    const T *a = g.a.vectors(g.chunks, c, i), *b = g.b.vectors(g.chunks, c, j);
    for (int64_t k = 0; k < width; k += lanes) {
      const Vec<T> s = load(a + k) - load(b + k), t = load(a + width + k) - load(b + width + k);
      store(ds + k0 + k, s), store(dt + k0 + k, t);
      s2 += s * s, t2 += t * t;
    }
  }
  T student = horizontal_sum<T>(s2), teacher = horizontal_sum<T>(t2);
  // Nearly equal vectors: their difference has lost digits to the centring. Negated so that NaN comes here too.
  if (!(student >= Guard<T>::rounded * (g.a.square_s[i] + g.b.square_s[j])) ||
      !(teacher >= Guard<T>::rounded * (g.a.square_t[i] + g.b.square_t[j]))) {
    const T *as = g.a.student.at(i), *at = g.a.teacher.at(i), *bs = g.b.student.at(j), *bt = g.b.teacher.at(j);
    student = teacher = T(0);
    for (int64_t k = 0; k < g.chunks.dims; ++k) {
      ds[k] = g.student_scale * (as[k * g.a.student.dim_stride] - bs[k * g.b.student.dim_stride]);
      dt[k] = at[k * g.a.teacher.dim_stride] - bt[k * g.b.teacher.dim_stride];
      student += ds[k] * ds[k];
      teacher += dt[k] * dt[k];
    }
  }
  const T ns = __builtin_sqrt(student), nt = __builtin_sqrt(teacher);
  const Vec<T> se = splat<T>(ns + g.rule.eps_s), te = splat<T>(nt + g.rule.eps_t), high = splat<T>(g.rule.delta);
  const auto residual = [&](int64_t k) { return load(ds + k) / se - load(dt + k) / te; };
  Vec<T> loss{}, along{};
  for (int64_t k = 0; k < padded; k += lanes) {
    const Vec<T> x = residual(k), h = huber_slope(x, high);
    loss += huber<Vec<T>, T>(x, h);
    along += h * load(ds + k);
  }
  if (g.need_grad) {
    const T radial = radial_slope(horizontal_sum<T>(along), ns, ns + g.rule.eps_s);
    const Vec<T> scale = splat<T>(static_cast<T>(g.scale));
    for (int64_t c = 0; c < g.chunks.count; ++c) {
      const int64_t width = g.chunks.width_of(c), k0 = g.chunks.begin(c);
      T *ga = g.a.grads(g.chunks, c, i), *gb = g.b.grads(g.chunks, c, j);
      for (int64_t k = 0; k < width; k += lanes) {
        const Vec<T> h = huber_slope(residual(k0 + k), high);
        const Vec<T> step = scale * (h / se - load(ds + k0 + k) * splat<T>(radial));
        store(ga + k, load(ga + k) + step);
        store(gb + k, load(gb + k) - step);
      }
    }
  }
  return static_cast<double>(horizontal_sum<T>(loss));
}

template <class T> double edges(const Graph<T>& g, const Block<T>& block, Scratch scratch) {
  Tile<T> tile = make_tile<T>(scratch);
  T* room = reinterpret_cast<T*>(scratch.data + tile_scratch_bytes<T>());
  for (int64_t k = 0; k < 2 * g.chunks.lanes_padded; ++k) room[k] = T(0);
  const int64_t columns = tile_columns<T>(g.chunks);
  double total = 0;
  for (int64_t r0 = block.row_begin; r0 < block.row_end; r0 += kTileRows) {
    const int64_t r1 = r0 + kTileRows < block.row_end ? r0 + kTileRows : block.row_end;
    for (int64_t c0 = block.column_begin; c0 < block.column_end; c0 += columns) {
      const int64_t c1 = c0 + columns < block.column_end ? c0 + columns : block.column_end;
      list_edges(g, block, r0, r1, c0, c1, tile);
      measure_edges(g, tile);
      total += weigh_edges(g, tile);
      for (int64_t k = 0; k < tile.n_literal; ++k)
        total += literal_edge(g, tile.row[tile.literal[k]], tile.column[tile.literal[k]], room);
      if (!g.need_grad || tile.n_literal == tile.count) continue;
      transpose_edges(c0, c1 - c0, tile);
      add_gradients(g, g.a, g.b, {r0, r1 - r0, tile.row_start, tile.column, tile.beta, tile.gamma});
      add_gradients(g, g.b, g.a,
                    {c0, c1 - c0, tile.column_start, tile.by_column_row, tile.by_column_beta, tile.by_column_gamma});
    }
  }
  return total;
}

// ---- dense blocks --------------------------------------------------------------------------------------------------------

// What weigh_edges does, for every edge of row i in columns [begin, end), whose dot products are given. In their place it
// leaves beta, gamma (zero on edges that are pruned or literal) and 0 for a literal edge, 1 for any other.
template <class T>
double weigh_row(const Graph<T>& g, int64_t i, int64_t begin, int64_t end, const T* entropy, T* dot_s, T* dot_t, T* dot_w,
                 int64_t* n_literal) {
  constexpr int64_t lanes = kLanes<T>;
  const T scale = static_cast<T>(g.scale);
  Vec<T> index{}, total{};
  for (int k = 0; k < lanes; ++k) index[k] = static_cast<T>(k);
  for (int64_t j = begin; j < end; j += lanes, dot_s += lanes, dot_t += lanes, dot_w += lanes) {
    const auto both = [&](const T* a, const T* b) { return a[i] + load(b + j); };
    const EdgeInput<Vec<T>> input = {load(dot_s),
                                     load(dot_t),
                                     load(dot_w),
                                     both(g.a.square_s, g.b.square_s),
                                     both(g.a.square_t, g.b.square_t),
                                     both(g.a.square_w, g.b.square_w),
                                     both(g.a.reach_s, g.b.reach_s),
                                     both(g.a.reach_t, g.b.reach_t)};
    const auto terms = quadratic_edge(input, g.rule, [](Vec<T> v) { return square_root(v); });
    auto kept = index < static_cast<T>(end - j);
    if (entropy != nullptr) kept &= load(entropy + (j - begin)) <= g.threshold;
    if (g.exclude_self && i >= j && i < j + lanes) kept[i - j] = 0;
    const auto literal = g.literal_only ? kept : kept & terms.literal;
    const auto smooth = kept & ~literal;
    const Vec<T> zero{}, one = zero + T(1);
    total += smooth ? terms.loss : zero;
    store(dot_s, smooth ? terms.beta * scale : zero);
    store(dot_t, smooth ? terms.gamma * scale : zero);
    store(dot_w, literal ? zero : one);
    if (!none(literal))
      for (int k = 0; k < lanes; ++k) *n_literal += literal[k] != 0;
  }
  return static_cast<double>(horizontal_sum<T>(total));
}

// ---- selection ---------------------------------------------------------------------------------------------------------

template <class T>
int64_t split(const T* x, int64_t n, T low, T high, T* found, int64_t room, int64_t* n_found) {
  int64_t below = 0, kept = *n_found, k = 0;
  // NaN is neither below `low` nor above `high`: it is found. Stores are whole registers: `found` has that much more room.
#if VRM_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __m512 l = _mm512_set1_ps(low), h = _mm512_set1_ps(high);
    for (; k + 16 <= n && kept <= room; k += 16) {
      const __m512 value = _mm512_loadu_ps(x + k);
      const __mmask16 under = _mm512_cmp_ps_mask(value, l, _CMP_LT_OQ);
      const __mmask16 within = _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(~under), value, h, _CMP_NGT_UQ);
      below += __builtin_popcount(under);
      if (within == 0) continue;
      _mm512_storeu_ps(found + kept, _mm512_maskz_compress_ps(within, value));
      kept += __builtin_popcount(within);
    }
  }
#endif
  for (; k < n; ++k) {
    const bool under = x[k] < low, within = !under & !(x[k] > high);
    below += under;
    if (kept <= room) found[kept] = x[k];
    kept += within;
  }
  *n_found = kept;
  return below;
}

template <class T> const Kernels<T>* kernels() {
  static const Kernels<T> table = {kPanelRows,   kPanelColumns<T>, sum_vertices<T>, spread<T>,    pack_panel<T>,
                                   entropy_rows<T>, pack_side<T>,  edges<T>,        weigh_row<T>, unpack_grad<T>,
                                   split<T>};
  return &table;
}

}  // namespace VRM_ISA_NAMESPACE
}  // namespace vrm
