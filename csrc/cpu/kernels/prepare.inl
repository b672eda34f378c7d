// Centring, and packing of the vectors into chunks with their norms.

// Adds every vertex to sums[dim], dims [begin, end); false if an element there is not a number, or too large.
template <class T> bool sum_vertices(Strided<T> m, int64_t count, int64_t begin, int64_t end, T* sums) {
  constexpr int64_t lanes = kLanes<T>;
  const Vec<T> limit = splat<T>(Guard<T>::largest);
  auto sound = limit == limit;
  bool tail = true;
  if (m.vertex_stride == 1) {
    for (int64_t k = begin; k < end; ++k) {
      const T* x = m.data + k * m.dim_stride;
      Vec<T> sum{};
      T rest = 0;
      int64_t v = 0;
      for (; v + lanes <= count; v += lanes) {
        const Vec<T> value = load(x + v);
        sum += value;
        sound &= magnitude<T>(value) <= limit;
      }
      for (; v < count; ++v) rest += x[v], tail &= x[v] <= limit[0] && x[v] >= -limit[0];
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
          sound &= magnitude<T>(value) <= limit;
        }
      for (; k < end; ++k) {
        const T value = x[k * m.dim_stride];
        sums[k] += value;
        tail &= value <= limit[0] && value >= -limit[0];
      }
    }
  }
  return none(~sound) && tail;
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

// Of one register of elements: the student, scaled, and the teacher, both centred, and their residual.
template <class T> VRM_INLINE void centre(Vec<T> s, Vec<T> t, Vec<T> cs, Vec<T> ct, T scale, Vec<T> out[3]) {
  out[0] = scale * (s - cs);
  out[1] = t - ct;
  out[2] = (scale * s - t) - (scale * cs - ct);  // student minus teacher first: exact where they have nearly converged
}

// One step of a transposition: swaps the off-diagonal quarters of each square of 2 D elements of rows i and i + D.
template <class T, int D, int... Lane>
VRM_INLINE void swap_quarters(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, Lane...>) {
  constexpr int lanes = kLanes<T>;
  const Vec<T> upper = __builtin_shufflevector(a, b, ((Lane & D) == 0 ? Lane : lanes + Lane - D)...);
  b = __builtin_shufflevector(a, b, ((Lane & D) == 0 ? Lane + D : lanes + Lane)...);
  a = upper;
}
template <class T, int D = kLanes<T> / 2> VRM_INLINE void transpose(Vec<T>* rows) {
  if constexpr (D > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i)
      if ((i & D) == 0) swap_quarters<T, D>(rows[i], rows[i + D], std::make_integer_sequence<int, kLanes<T>>());
    transpose<T, D / 2>(rows);
  }
}

// The student and the teacher are both dense along the dimensions, or both along the vertices.
template <class T>
VRM_INLINE void pack_chunk(const Graph<T>& g, const Side<T>& side, int64_t c, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t width = g.chunks.width_of(c), dims = g.chunks.dims_of(c), k0 = g.chunks.begin(c);
  const T *cs = g.center_s + k0, *ct = g.center_t + k0, scale = g.student_scale;
  T* out = const_cast<T*>(side.vectors(g.chunks, c, begin));
  const auto put = [&](Vec<T> s, Vec<T> t, int64_t v, int64_t k) {  // of vertex v, dimensions from k on
    Vec<T> parts[3];
    centre<T>(s, t, load_part(cs + k, dims - k, T(0)), load_part(ct + k, dims - k, T(0)), scale, parts);
    for (int part = 0; part < 3; ++part) store(out + ((v - begin) * 3 + part) * width + k, parts[part]);
  };
  if (side.student.dim_stride == 1 && side.teacher.dim_stride == 1) {
    for (int64_t v = begin; v < end; ++v) {
      const T *s = side.student.at(v) + k0, *t = side.teacher.at(v) + k0;
      for (int64_t k = 0; k < width; k += lanes)
        put(load_part(s + k, dims - k, T(0)), load_part(t + k, dims - k, T(0)), v, k);
    }
    return;
  }
  for (int64_t v = begin; v < end; v += lanes)
    for (int64_t k = 0; k < width; k += lanes) {  // a square of so many vertices and dimensions
      const int64_t n = end - v < lanes ? end - v : lanes;
      Vec<T> s[lanes], t[lanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < lanes; ++r) {
        s[r] = t[r] = Vec<T>{};
        if (k + r >= dims) continue;
        s[r] = load_part(side.student.at(v) + (k0 + k + r) * side.student.dim_stride, n, T(0));
        t[r] = load_part(side.teacher.at(v) + (k0 + k + r) * side.teacher.dim_stride, n, T(0));
      }
      transpose<T>(s);
      transpose<T>(t);
      for (int64_t r = 0; r < n; ++r) put(s[r], t[r], v + r, k);
    }
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
