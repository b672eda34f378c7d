// The gradients of a tile's edges, and of a side once all edges are done.

// Lists the tile's edges again, column by column.
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

// grad_v += sum over its edges of gamma x_other - beta residual_other, NV registers of a chunk: in registers
// throughout, because stores between the loads would stall them. The two terms have a sum each where there are registers
// for it, because with few of them the additions of one edge would wait for each other.
template <class T, int NV>
VRM_STAGE void add_neighbours(const Graph<T>& g, const Side<T>& own, const Side<T>& other, int64_t c, int64_t offset,
                              const EdgeList<T>& list) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t width = g.chunks.width_of(c);
  const bool first = c == 0 && offset == 0;
  const T *vectors = other.vectors(g.chunks, c, 0) + offset, *betas = list.beta, *gammas = list.gamma;
  const int32_t* others = list.other;
  T* grads = own.grads(g.chunks, c, list.first) + offset;
  for (int64_t v = 0; v < list.vertices; ++v, grads += width) {
    const int64_t end = list.start[v + 1];
    if (list.start[v] == end) continue;
    constexpr bool apart = NV <= VRM_VECTOR_BYTES / 8;
    Vec<T> sum[NV], more[NV] = {}, beta_sum{}, gamma_sum{};
#pragma GCC unroll 8
    for (int k = 0; k < NV; ++k) sum[k] = load(grads + k * lanes);
    for (int64_t e = list.start[v]; e < end; ++e) {
      const Vec<T> beta = splat<T>(betas[e]), gamma = splat<T>(gammas[e]);
      const T *x = vectors + 3 * width * others[e], *residual = x + 2 * width;
      asm("" : "+r"(residual));  // an address register of its own, not one for every load
#pragma GCC unroll 8
      for (int k = 0; k < NV; ++k) sum[k] += gamma * load(x + k * lanes);
#pragma GCC unroll 8
      for (int k = 0; k < NV; ++k) (apart ? more : sum)[k] -= beta * load(residual + k * lanes);
      beta_sum += beta;
      gamma_sum += gamma;
    }
#pragma GCC unroll 8
    for (int k = 0; k < NV; ++k) store(grads + k * lanes, apart ? sum[k] + more[k] : sum[k]);
    if (!first) continue;
    own.beta_sum[list.first + v] += beta_sum[0];
    own.gamma_sum[list.first + v] += gamma_sum[0];
  }
}

template <class T>
void add_gradients(const Graph<T>& g, const Side<T>& own, const Side<T>& other, const EdgeList<T>& list) {
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

template <class T> VRM_INLINE void add_part(T* to, Vec<T> v, int64_t n) { store_part(to, load_part(to, n, T(0)) + v, n); }

template <class T>
void unpack_grad(const Graph<T>& g, const Side<T>& side, int64_t begin, int64_t end, T* out, int64_t vertex_stride,
                 int64_t dim_stride) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t v0 = begin; v0 < end; v0 += lanes) {
    const int64_t n = v0 + lanes < end ? lanes : end - v0;
    for (int64_t c = 0; c < g.chunks.count; ++c) {
      const int64_t width = g.chunks.width_of(c), dims = g.chunks.dims_of(c);
      T* to = out + (v0 - begin) * vertex_stride + g.chunks.begin(c) * dim_stride;
      for (int64_t k = 0; k < width; k += lanes, to += lanes * dim_stride) {
        Vec<T> square[lanes];
#pragma GCC unroll 16
        for (int64_t v = 0; v < lanes; ++v) {
          square[v] = Vec<T>{};
          if (v >= n) continue;
          const T* x = side.vectors(g.chunks, c, v0 + v) + k;
          square[v] = load(side.grads(g.chunks, c, v0 + v) + k) +
                      (side.beta_sum[v0 + v] * load(x + 2 * width) - side.gamma_sum[v0 + v] * load(x));
        }
        if (dim_stride == 1) {
          for (int64_t v = 0; v < n; ++v) add_part(to + v * vertex_stride, square[v], dims - k);
        } else if (vertex_stride == 1) {
          transpose<T>(square);
          for (int64_t d = 0; d < lanes && k + d < dims; ++d) add_part(to + d * dim_stride, square[d], n);
        } else {
          for (int64_t v = 0; v < n; ++v)
            for (int64_t d = 0; d < lanes && k + d < dims; ++d) to[v * vertex_stride + d * dim_stride] += square[v][d];
        }
      }
    }
  }
}
