// The kept edges of a tile: listed, measured by dot products, and weighed.

// The kept edges of one tile, row by row, and what is known of each.
template <class T> struct Tile {
  int64_t row_begin, rows, count, n_literal;
  int32_t row_start[kTileRows + 1];
  int32_t column_start[kMaxTileColumns + 1];
  int32_t *row, *column, *literal, *by_column_row;
  T *square_s, *square_t, *square_w, *reach_s, *reach_t;  // of both ends: see EdgeInput
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
  for (T** array : {&tile.square_s, &tile.square_t, &tile.square_w, &tile.reach_s, &tile.reach_t, &tile.dot_s,
                    &tile.dot_t, &tile.dot_w, &tile.beta, &tile.gamma, &tile.by_column_beta, &tile.by_column_gamma})
    *array = reinterpret_cast<T*>(take(edges * sizeof(T)));
  for (int32_t** array : {&tile.row, &tile.column, &tile.literal, &tile.by_column_row})
    *array = reinterpret_cast<int32_t*>(take(edges * sizeof(int32_t)));
  tile.partial = reinterpret_cast<T*>(take(3 * edges * kAlignBytes));
  return tile;
}

// Notes the edges of row i from the n-th on, whose columns are noted.
template <class T> VRM_INLINE void describe_edges(const Graph<T>& g, int64_t i, int64_t n, int64_t end, Tile<T>& tile) {
  const T square_s = g.a.square_s[i], square_t = g.a.square_t[i], square_w = g.a.square_w[i];
  const T reach_s = g.a.reach_s[i], reach_t = g.a.reach_t[i];
  for (; n < end; ++n) {
    int64_t j = tile.column[n];
    asm("" : "+r"(j));  // not to be made gathers, which take longer
    tile.square_s[n] = square_s + g.b.square_s[j];
    tile.square_t[n] = square_t + g.b.square_t[j];
    tile.square_w[n] = square_w + g.b.square_w[j];
    tile.reach_s[n] = reach_s + g.b.reach_s[j];
    tile.reach_t[n] = reach_t + g.b.reach_t[j];
  }
}

// Lists the edges of row i in columns [begin, end) that pass, from the n-th on; returns how many there are now.
template <class T>
VRM_INLINE int64_t list_row(const Graph<T>& g, int64_t i, const T* h, int64_t begin, int64_t end, int64_t n, Tile<T>& tile) {
#if VRM_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __m512 limit = _mm512_set1_ps(g.threshold);
    const T* const of_a[] = {g.a.square_s, g.a.square_t, g.a.square_w, g.a.reach_s, g.a.reach_t};
    const T* const of_b[] = {g.b.square_s, g.b.square_t, g.b.square_w, g.b.reach_s, g.b.reach_t};
    T* const of_edge[] = {tile.square_s, tile.square_t, tile.square_w, tile.reach_s, tile.reach_t};
    __m512i index = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(begin)),
                                     _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (int64_t j = begin; j < end; j += 16) {
      const int64_t left = end - j;
      const __mmask16 valid = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      const __m512 x = _mm512_maskz_loadu_ps(valid, h + (j - begin));
      const __mmask16 kept = _mm512_mask_cmp_ps_mask(valid, x, limit, _CMP_LE_OQ);
      _mm512_storeu_si512(tile.column + n, _mm512_maskz_compress_epi32(kept, index));
#pragma GCC unroll 5
      for (int k = 0; k < 5; ++k)
        store(of_edge[k] + n, (Vec<T>)_mm512_maskz_compress_ps(kept, (__m512)(of_a[k][i] + load(of_b[k] + j))));
      n += __builtin_popcount(kept);
      index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
    }
    return n;
  }
#endif
  const int64_t first = n;
  for (int64_t j = begin; j < end; ++j) {
    tile.column[n] = static_cast<int32_t>(j);
    n += h[j - begin] <= g.threshold;
  }
  describe_edges(g, i, first, n, tile);
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
      n = list_row(g, i, h, c0, c1, n, tile);
    } else {
      for (int64_t j = c0; j < c1; ++j) {
        tile.column[n] = static_cast<int32_t>(j);
        n += !(g.exclude_self && i == j);
      }
      describe_edges(g, i, first, n, tile);
    }
    for (int64_t e = first; e < n; ++e) tile.row[e] = static_cast<int32_t>(i);
  }
  tile.row_start[tile.rows] = static_cast<int32_t>(n);
  tile.count = n;
  for (int64_t e = n; e < n + kLanes<T>; ++e) tile.column[e] = 0;  // so that there is a vertex to read
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
template <class T, int NV> VRM_STAGE void measure_rows(const Graph<T>& g, int64_t c, Tile<T>& tile) {
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

template <class T> void measure_edges(const Graph<T>& g, Tile<T>& tile) {
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

// The largest components of an edge's differences, instead of the bound on them that its ends give: their largest
// components are mostly those of different dimensions.
template <class T> VRM_INLINE void measure_reach(const Graph<T>& g, int64_t e, Tile<T>& tile) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> most_s{}, most_t{};
  for (int64_t c = 0; c < g.chunks.count; ++c) {
    const int64_t width = g.chunks.width_of(c);
    const T *a = g.a.vectors(g.chunks, c, tile.row[e]), *b = g.b.vectors(g.chunks, c, tile.column[e]);
    for (int64_t k = 0; k < width; k += lanes) {
      most_s = maximum<T>(most_s, magnitude<T>(load(a + k) - load(b + k)));
      most_t = maximum<T>(most_t, magnitude<T>(load(a + width + k) - load(b + width + k)));
    }
  }
  tile.reach_s[e] = horizontal_max<T>(most_s);
  tile.reach_t[e] = horizontal_max<T>(most_t);
}

// Computes the coefficients of every edge of the tile, vectorised over the edges, and returns the sum of their losses.
// Literal edges get none and are listed in tile.literal.
template <class T> VRM_STAGE double weigh_edges(const Graph<T>& g, Tile<T>& tile) {
  constexpr int64_t lanes = kLanes<T>;
  const T scale = static_cast<T>(g.scale);
  for (int64_t e = tile.count; e % lanes != 0; ++e) tile.dot_s[e] = tile.dot_t[e] = tile.dot_w[e] = T(0);
  const auto weigh = [&](int64_t e) {
    const EdgeInput<Vec<T>> input = {load(tile.dot_s + e), load(tile.dot_t + e), load(tile.dot_w + e),
                                     load(tile.square_s + e), load(tile.square_t + e), load(tile.square_w + e),
                                     load(tile.reach_s + e), load(tile.reach_t + e)};
    return quadratic_edge(input, g.rule, [](Vec<T> v) { return square_root(v); });
  };
  Vec<T> total{};
  tile.n_literal = 0;
  for (int64_t e = 0; e < tile.count; e += lanes) {
    const int64_t valid = tile.count - e;
    const auto each_of = [&](auto literal, const auto& body) {
      for (int64_t k = 0; k < lanes && k < valid; ++k)
        if (literal[k]) body(e + k);
    };
    auto terms = weigh(e);
    if (g.literal_only) {
      terms.literal |= -1;
    } else if (!none(terms.literal)) {
      each_of(terms.literal, [&](int64_t edge) { measure_reach(g, edge, tile); });
      terms = weigh(e);
    }
    const Vec<T> zero{};
    store(tile.beta + e, terms.literal ? zero : terms.beta * scale);
    store(tile.gamma + e, terms.literal ? zero : terms.gamma * scale);
    total += first_lanes(terms.literal ? zero : terms.loss, valid);
    if (!none(terms.literal))
      each_of(terms.literal, [&](int64_t edge) { tile.literal[tile.n_literal++] = static_cast<int32_t>(edge); });
  }
  return static_cast<double>(horizontal_sum<T>(total));
}
