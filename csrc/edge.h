// One edge of a relation graph: the maths shared by every compiled backend, on the host and on the device.
//
// With d = a_i - b_j for the student (S) and the teacher (T), n = ||d|| and e = d / (n + eps), an edge whose residual
// e_S - e_T stays within delta in every component costs q / 2, q = ||e_S - e_T||^2. From the two norms and the squared
// norm h of d_S - d_T:
//
//     n_S - n_T = (n_S^2 - n_T^2) / (n_S + n_T) =: gap
//     chord     = (h - gap^2) / 2  =  n_S n_T (1 - cos(d_S, d_T))
//     u, v      = 1 / (n_S + eps_S), 1 / (n_T + eps_T)
//     r         = n_S u - n_T v = eps_T v - eps_S u
//     q         = r^2 + 2 u v chord
//     d(q/2)/dd_S = beta (d_S - d_T) - gamma d_S,    beta  = u v
//                                                    gamma = u^2 (v (gap + eps_S - eps_T + chord / n_S) + r)
//
// Taking h from the residuals w_i = a_S - a_T and z_j = b_S - b_T instead of d_S.d_T keeps the digits where the student
// has nearly converged to the teacher, provided that both are of one size. So the student is scaled to the teacher's,
// by a power of two, which rounds nothing; eps_S is eps scaled likewise, which leaves every relation what it was.
#pragma once

#if defined(__CUDACC__)
#define VRM_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define VRM_HOST_DEVICE __forceinline
#else
#define VRM_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace vrm {

// Below this share of ||a||^2 + ||b||^2 a squared norm from a dot product has lost too many digits: take the literal
// path. With the student at the teacher + 0.1 % noise the float32 gradient's error was 1.5e-4 with a share of 0.02 and is
// under 1e-5 with 0.1, where little but edges between the two views of one vertex is affected.
template <class T> struct Guard;
template <> struct Guard<float> {
  static constexpr float cancelled = 0.1f;  // of the centred vectors: recompute from differences
  static constexpr float rounded = 1e-4f;    // even the centring lost digits: recompute from the raw vectors
  static constexpr float tiny = 1e-30f, huge = 1e30f;  // products of four norms that keep their digits
  static constexpr float largest = 1e15f;              // component whose squares can be summed; beyond it the loss is NaN
};
template <> struct Guard<double> {
  static constexpr double cancelled = 1e-3;
  static constexpr double rounded = 1e-10;
  static constexpr double tiny = 1e-270, huge = 1e270;
  static constexpr double largest = 1e150;
};

constexpr double kRelationEps = 1e-7;
constexpr double kCountEps = 1e-7;
constexpr double kEntropyEps = 1e-7;  // these three also in vrm_kernels/graph/constants.py: a test compares them

// V is a scalar or a vector register of edges, T its element, Mask what V's comparisons give.
template <class V, class Mask> struct EdgeTerms {
  V loss;        // q / 2
  V beta;        // d(q/2)/dd_S = beta (d_S - d_T) - gamma d_S
  V gamma;
  Mask literal;  // not certified, or badly conditioned: the component-wise formula must be used instead
};

// The dot products of one edge and, for each side, squared norms and largest magnitudes of the centred vectors.
template <class V> struct EdgeInput {
  V dot_s, dot_t, dot_w;
  V square_s, square_t, square_w;  // ||a||^2 + ||b||^2, of student, teacher, residual
  V reach_s, reach_t;              // max |a_c| + max |b_c|: bounds every |d_c|
};

template <class T> struct EdgeRule {
  T delta, eps_s, eps_t;
};

// `root` is the square root of a V.
template <class T, class V, class Root>
VRM_HOST_DEVICE auto quadratic_edge(const EdgeInput<V>& x, const EdgeRule<T>& rule, const Root& root) {
  const T half = static_cast<T>(0.5);
  const V zero = x.dot_s - x.dot_s, one = zero + static_cast<T>(1);
  const V s2 = x.square_s - 2 * x.dot_s;
  const V t2 = x.square_t - 2 * x.dot_t;
  const V h = x.square_w - 2 * x.dot_w;
  // NaN, and infinity minus infinity, compare false: the literal path.
  const auto sound = (s2 > Guard<T>::cancelled * x.square_s) & (t2 > Guard<T>::cancelled * x.square_t);
  const V ns = root(sound ? s2 : one);
  const V nt = root(sound ? t2 : one);
  // One division for 1 / (n_S + eps_S), 1 / (n_T + eps_T), 1 / (n_S + n_T) and 1 / n_S.
  const V se = ns + rule.eps_s, te = nt + rule.eps_t, sum = ns + nt;
  const V se_te = se * te, sum_ns = sum * ns, product = se_te * sum_ns;
  const auto in_range = (product > Guard<T>::tiny) & (product < Guard<T>::huge);
  const V inverse = 1 / product;
  const V beta = inverse * sum_ns, rest = inverse * se_te;
  const V u = beta * te, v = beta * se, gap = (s2 - t2) * (rest * ns), inverse_ns = rest * sum;
  const V spread = half * (h - gap * gap);
  const V chord = spread > 0 ? spread : zero;
  const V r = rule.eps_t * v - rule.eps_s * u;
  const V loss = half * r * r + beta * chord;
  // ||e_S - e_T|| <= delta bounds every component; so does max|d_S| u + max|d_T| v, which also certifies nearly all
  // edges of an untrained student, whose cosines are near zero.
  const auto certified = (2 * loss <= rule.delta * rule.delta) | (x.reach_s * u + x.reach_t * v <= rule.delta);
  const auto usable = sound & in_range & certified;
  return EdgeTerms<V, decltype(sound & certified)>{
      loss, beta, u * u * (v * (gap + (rule.eps_s - rule.eps_t) + chord * inverse_ns) + r), usable == 0};
}

// An edge literally, component by component: huber(x) = h (x - h / 2) of x = e_S - e_T, with h = huber'(x) = x clamped to
// [-delta, delta].
template <class V> VRM_HOST_DEVICE V huber_slope(V x, V delta) { return x > delta ? delta : x < -delta ? -delta
                                                                                                       : x; }
template <class V, class T = V> VRM_HOST_DEVICE V huber(V x, V h) { return h * (x - h * static_cast<T>(0.5)); }

// d loss/dd_S = h / (n + eps) - radial d_S, because de/dd = I / (n + eps) - d d^T / (n (n + eps)^2), and I / eps at d = 0,
// as torch differentiates a norm there. `along` is the sum of h d_S, `end` is n + eps.
template <class T> VRM_HOST_DEVICE T radial_slope(T along, T n, T end) { return n > 0 ? along / (n * end) / end : T(0); }

}  // namespace vrm
