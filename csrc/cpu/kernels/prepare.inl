// Centring, and packing of the vectors into chunks with their norms.

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
