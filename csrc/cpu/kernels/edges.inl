// The kept edges of a tile: listed, measured by dot products, and weighed.

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

// Adds one chunk to the three dot products of NE edges of one row.
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

// The same where there are 32 registers: the three vectors of a row, NV registers each, stay there for all of the row's
// edges.
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

// Computes the coefficients of every edge of the tile, vectorised over the edges, and returns the sum of their losses.
// Literal edges get none and are listed in tile.literal.
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
