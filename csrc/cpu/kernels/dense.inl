// The dense form: the edges of a row, all of whose dot products are given.

// Does for every edge of row i in columns [begin, end) what weigh_edges does for the kept ones. It overwrites the dot
// products with beta and gamma (zero on edges that are pruned or literal) and with 0 for a literal edge, 1 for any
// other.
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
