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
// throughout, because stores between the loads would stall them.
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
