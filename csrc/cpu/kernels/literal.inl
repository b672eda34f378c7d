// The component-wise formula of one edge, for those that the dot products do not decide.

template <class T> double literal_edge(const Graph<T>& g, int64_t i, int64_t j, T* room) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t padded = g.chunks.lanes_padded;
  T *ds = room, *dt = room + padded, *slope = dt;  // the teacher's differences end as Huber's slopes
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
  const T us = T(1) / (ns + g.rule.eps_s), ut = T(1) / (nt + g.rule.eps_t);
  const Vec<T> high = splat<T>(g.rule.delta);
  Vec<T> loss{}, along{};
  for (int64_t k = 0; k < padded; k += lanes) {
    const Vec<T> s = load(ds + k), x = s * us - load(dt + k) * ut, h = huber_slope(x, high);
    loss += huber<Vec<T>, T>(x, h);
    along += h * s;
    store(slope + k, h);
  }
  if (g.need_grad) {
    const T radial = radial_slope(horizontal_sum<T>(along), ns, ns + g.rule.eps_s);
    const T scale = static_cast<T>(g.scale), straight = scale * us, back = scale * radial;
    for (int64_t c = 0; c < g.chunks.count; ++c) {
      const int64_t width = g.chunks.width_of(c), k0 = g.chunks.begin(c);
      T *ga = g.a.grads(g.chunks, c, i), *gb = g.b.grads(g.chunks, c, j);
      for (int64_t k = 0; k < width; k += lanes) {
        const Vec<T> step = load(slope + k0 + k) * straight - load(ds + k0 + k) * back;
        store(ga + k, load(ga + k) + step);
        store(gb + k, load(gb + k) - step);
      }
    }
  }
  return static_cast<double>(horizontal_sum<T>(loss));
}
