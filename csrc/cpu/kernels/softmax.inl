// Softmax, surprisals and cross-entropy of one row of logits, with the gradient.

template <class T> struct Number;
template <> struct Number<float> {
  static constexpr int mantissa = 23;
  static constexpr float round = 12582912.0f;        // added, it leaves an integer in the lowest bits
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float least = -87.0f;             // its exponential is still a normal number
  static constexpr int exp_terms = 7, log_terms = 5;
};
template <> struct Number<double> {
  static constexpr int mantissa = 52;
  static constexpr double round = 6755399441055744.0;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double least = -708.0;
  static constexpr int exp_terms = 13, log_terms = 11;
};
template <class T> constexpr T kSqrtHalf = static_cast<T>(0.70710678118654752440);

// e^x for x <= 0: 2^n e^r, r within ln(2) / 2 of 0, where the series of e^r is good to the last bit.
template <class T> VRM_INLINE Vec<T> exponential(Vec<T> x) {
  using N = Number<T>;
  x = maximum<T>(x, splat<T>(N::least));
  const Vec<T> shifted = x * static_cast<T>(1.44269504088896340736) + N::round;
  const Vec<T> n = shifted - N::round;
  const Vec<T> r = (x - n * N::ln2_high) - n * N::ln2_low;
  T factorial[N::exp_terms + 1] = {T(1)};
  for (int k = 1; k <= N::exp_terms; ++k) factorial[k] = factorial[k - 1] * static_cast<T>(k);
  Vec<T> sum = splat<T>(T(1) / factorial[N::exp_terms]);
#pragma GCC unroll 16
  for (int k = N::exp_terms - 1; k >= 0; --k) sum = sum * r + T(1) / factorial[k];
  const VecInt<T> power = ((VecInt<T>)shifted - (VecInt<T>)splat<T>(N::round)) << N::mantissa;
  return sum * (Vec<T>)(power + (VecInt<T>)splat<T>(T(1)));
}

// log x for normal x > 0: n ln 2 + 2 atanh(s), s = (m - 1) / (m + 1), x = m 2^n with m between sqrt(1/2) and sqrt(2).
template <class T> VRM_INLINE Vec<T> logarithm(Vec<T> x) {
  using N = Number<T>;
  const VecInt<T> half = (VecInt<T>)splat<T>(kSqrtHalf<T>);
  const VecInt<T> exponent = ((VecInt<T>)x - half) >> N::mantissa;
  const Vec<T> m = (Vec<T>)((VecInt<T>)x - (exponent << N::mantissa));
  const Vec<T> n = (Vec<T>)(exponent + (VecInt<T>)splat<T>(N::round)) - N::round;
  const Vec<T> s = (m - T(1)) / (m + T(1)), z = s * s;
  Vec<T> sum = splat<T>(T(1) / static_cast<T>(2 * N::log_terms - 1));
#pragma GCC unroll 16
  for (int k = N::log_terms - 2; k >= 0; --k) sum = sum * z + T(1) / static_cast<T>(2 * k + 1);
  return n * N::ln2_high + (n * N::ln2_low + 2 * s * sum);
}

// Up to one register of a row's elements, the others `fill`.
template <class T> VRM_INLINE Vec<T> load_part(const T* p, int64_t n, T fill) {
  if (n >= kLanes<T>) return load(p);
#if VRM_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_mask_loadu_ps((__m512)splat<T>(fill), static_cast<__mmask16>((1u << n) - 1), p);
#endif
  Vec<T> v = splat<T>(fill);
  for (int k = 0; k < n; ++k) v[k] = p[k];
  return v;
}
template <class T> VRM_INLINE void store_part(T* p, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) return store(p, v);
#if VRM_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#endif
  for (int k = 0; k < n; ++k) p[k] = v[k];
}

// With zeros in the place of the elements from the n-th on.
template <class V> VRM_INLINE V first_lanes(V v, int64_t n) {
  V index;
  for (int k = 0; k < static_cast<int>(sizeof(V) / sizeof(v[0])); ++k) index[k] = static_cast<decltype(v[0] + 0)>(k);
  return index < static_cast<decltype(v[0] + 0)>(n) ? v : V{};
}

template <class T> double softmax_row(const SoftmaxRow<T>& row) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t classes = row.classes;
  const T *x = row.logits, lowest = -__builtin_huge_val();
  Vec<T> most = splat<T>(lowest);
  for (int64_t c = 0; c < classes; c += lanes) most = maximum<T>(most, load_part(x + c, classes - c, lowest));
  const T top = horizontal_max<T>(most);

  T* const powers = row.probs != nullptr ? row.probs : row.log_probs != nullptr ? row.log_probs
                                                                                : row.grad;
  Vec<T> total{};
  for (int64_t c = 0; c < classes; c += lanes) {
    const Vec<T> e = exponential<T>(load_part(x + c, classes - c, lowest) - top);
    if (powers != nullptr) store_part(powers + c, e, classes - c);
    total += first_lanes(e, classes - c);
  }
  const T sum = horizontal_sum<T>(total), inverse = T(1) / sum;

  // The target q of a class: weight (hot t + even), t its probability in the labels.
  const bool spread_out = row.cross_entropy && (row.target != nullptr || row.even != T(0));
  const auto target = [&](int64_t c) {
    const int64_t n = classes - c;
    Vec<T> q = splat<T>(row.even);
    if (row.target != nullptr) q += row.hot * load_part(row.target + c, n, T(0));
    return row.weight == nullptr ? q : q * load_part(row.weight + c, n, T(0));
  };
  double mass = 0, along = 0;  // the sums of q and of q (x - top)
  if (spread_out) {
    Vec<T> q_sum{}, x_sum{};
    for (int64_t c = 0; c < classes; c += lanes) {
      const Vec<T> q = first_lanes(target(c), classes - c);
      q_sum += q, x_sum += q * (load_part(x + c, classes - c, top) - top);
    }
    mass = horizontal_sum<T>(q_sum), along = horizontal_sum<T>(x_sum);
  }
  T at_label = 0;
  if (row.cross_entropy && row.target == nullptr) {
    at_label = row.hot * (row.weight == nullptr ? T(1) : row.weight[row.label]);
    mass += at_label;
    along += static_cast<double>(at_label) * (static_cast<double>(x[row.label]) - static_cast<double>(top));
  }

  const T share = row.cross_entropy ? inverse * static_cast<T>(mass * row.scale) : T(0);
  const T scale = static_cast<T>(row.scale);
  if (powers != nullptr)
    for (int64_t c = 0; c < classes; c += lanes) {
      const int64_t n = classes - c;
      const Vec<T> e = load_part(powers + c, n, T(1)), p = e * inverse;
      if (row.grad != nullptr) store_part(row.grad + c, spread_out ? e * share - scale * target(c) : e * share, n);
      if (row.log_probs != nullptr) store_part(row.log_probs + c, logarithm<T>(p + static_cast<T>(kEntropyEps)), n);
      if (row.probs != nullptr) store_part(row.probs + c, p, n);
    }
  if (row.grad != nullptr && row.cross_entropy && row.target == nullptr) row.grad[row.label] -= scale * at_label;
  return row.cross_entropy ? mass * __builtin_log(static_cast<double>(sum)) - along : 0;
}
