// Exact order statistics without sorting and without a second copy of the data.
//
// The values come as a stream that can be replayed (stored, or recomputed bit for bit). A sample brackets the wanted
// rank; one pass then counts what lies below the bracket and collects the few values inside it. Where the bracket missed,
// or ties fill it, passes over 16-bit digits of order-preserving integer keys find the values instead: also exact.
#pragma once

#include "graph.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

namespace vrm {

// Two neighbouring order statistics. `kept` counts the values at or below a threshold, see count_at_most().
template <class T> struct OrderStatistics {
  T low, high;  // sorted[rank], sorted[min(rank + 1, n - 1)]; NaN if any value is
  int64_t below;         // values below the bracket ...
  std::vector<T> found;  // ... and the values inside it; empty if the digit passes were needed
};

template <class T> using Run = std::function<void(const T* x, int64_t n)>;

// A replayable stream of n values in `parts` parts that may be visited concurrently.
template <class T> struct Stream {
  int64_t n;
  int64_t parts;
  std::function<void(int64_t part, const Run<T>& visit)> visit_part;
  std::function<void(int64_t parts, const std::function<void(int64_t)>& body)> for_each;
  std::function<std::vector<T>(int64_t m)> sample;  // m pseudo-random values; close to the stream's is enough
};

template <class T> struct Key;
template <> struct Key<float> {
  using type = uint32_t;
};
template <> struct Key<double> {
  using type = uint64_t;
};

// Unsigned integers in the order of the floats.
template <class T> typename Key<T>::type to_key(T x) {
  typename Key<T>::type u;
  constexpr int top = sizeof(T) * 8 - 1;
  std::memcpy(&u, &x, sizeof(T));
  return (u >> top) != 0 ? ~u : u | (typename Key<T>::type{1} << top);
}
template <class T> T from_key(typename Key<T>::type u) {
  constexpr int top = sizeof(T) * 8 - 1;
  u = (u >> top) != 0 ? u & ~(typename Key<T>::type{1} << top) : ~u;
  T x;
  std::memcpy(&x, &u, sizeof(T));
  return x;
}

inline uint64_t mix(uint64_t x) {  // splitmix64: a fixed pseudo-random sequence
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// sorted[rank] by 16-bit digits of the keys. False if a value is NaN.
template <class T> bool select_by_digits(const Stream<T>& stream, int64_t rank, T* value) {
  using U = typename Key<T>::type;
  constexpr int bits = sizeof(T) * 8;
  U prefix = 0;
  bool nan = false;
  for (int shift = bits - 16; shift >= 0; shift -= 16) {
    std::vector<std::vector<int64_t>> counts(stream.parts);
    std::vector<char> nans(stream.parts, 0);
    stream.for_each(stream.parts, [&](int64_t part) {
      counts[part].assign(1 << 16, 0);
      stream.visit_part(part, [&](const T* x, int64_t n) {
        for (int64_t k = 0; k < n; ++k) {
          if (std::isnan(x[k])) nans[part] = 1;
          const U key = to_key(x[k]);
          if (shift + 16 == bits || key >> (shift + 16) == prefix) ++counts[part][(key >> shift) & 0xffff];
        }
      });
    });
    for (char found : nans) nan = nan || found;
    if (nan) return false;
    U digit = 0;
    for (;; ++digit) {
      int64_t here = 0;
      for (const auto& count : counts) here += count[digit];
      if (rank < here) break;
      rank -= here;
    }
    prefix = static_cast<U>(prefix << 16) | digit;
  }
  *value = from_key<T>(prefix);
  return true;
}

// Values between which sorted[rank] of n values very likely lies, from a sample of them, which is reordered.
template <class T> std::pair<T, T> bracket(std::vector<T>& sample, int64_t rank, double n, double* share) {
  // A sample of m is wrong by about sqrt(m p (1 - p)) positions; four of those are rarely exceeded.
  const double m = static_cast<double>(sample.size()), p = static_cast<double>(rank) / n;
  const int64_t slack = 2 + static_cast<int64_t>(4 * std::sqrt(m * p * (1 - p))), centre = static_cast<int64_t>(p * m);
  const auto order_statistic = [&](int64_t k) {
    std::nth_element(sample.begin(), sample.begin() + k, sample.end());
    return sample[k];
  };
  *share = 2.0 * static_cast<double>(slack) / m;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  const int64_t size = static_cast<int64_t>(sample.size());
  return {centre - slack < 0 ? -infinity : order_statistic(centre - slack),
          centre + slack >= size ? infinity : order_statistic(centre + slack)};
}

// sorted[rank] and sorted[next] of an array: brackets until little is left. The order of `values` is lost.
template <class T> std::pair<T, T> select_pair(std::vector<T> values, int64_t rank, int64_t next) {
  constexpr size_t few = 1024;
  while (values.size() > few) {
    std::vector<T> sample(few / 2);
    for (size_t s = 0; s < sample.size(); ++s) sample[s] = values[mix(s) % values.size()];
    double share;
    const auto [low, high] = bracket(sample, rank, static_cast<double>(values.size()), &share);
    std::vector<T> inside(values.size() + kAlignBytes);
    int64_t n = 0;
    const int64_t size = static_cast<int64_t>(values.size());
    const int64_t below = kernels<T>().split(values.data(), size, low, high, inside.data(), size, &n);
    if (rank < below || next >= below + n || 2 * n > size) break;
    inside.resize(n);
    values = std::move(inside);
    rank -= below, next -= below;
  }
  std::nth_element(values.begin(), values.begin() + rank, values.end());
  const T low = values[rank];
  return {low, next == rank ? low : *std::min_element(values.begin() + next, values.end())};
}

template <class T> OrderStatistics<T> select(const Stream<T>& stream, int64_t rank, int64_t room) {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const int64_t next = std::min(rank + 1, stream.n - 1);
  const double n = static_cast<double>(stream.n);
  // Larger samples cost more and leave fewer values inside the bracket.
  std::vector<T> sample = stream.sample(static_cast<int64_t>(std::min(n, std::clamp(std::pow(n, 0.6), 256.0, 262144.0))));
  for (T x : sample)
    if (std::isnan(x)) return {nan, nan, 0, {}};
  double share;
  const auto [low, high] = bracket(sample, rank, n, &share);
  room = std::min(room, 4096 * stream.parts + static_cast<int64_t>(2 * share * n));

  std::vector<std::vector<T>> found(stream.parts);
  std::vector<int64_t> n_found(stream.parts, 0), below(stream.parts, 0);
  const int64_t part_room = room / stream.parts;
  const auto& kernel = kernels<T>();
  stream.for_each(stream.parts, [&, low = low, high = high](int64_t part) {
    found[part].resize(part_room + kAlignBytes);  // split() stores whole registers
    stream.visit_part(part, [&, low = low, high = high](const T* x, int64_t count) {
      below[part] += kernel.split(x, count, low, high, found[part].data(), part_room, &n_found[part]);
    });
  });
  OrderStatistics<T> out{nan, nan, 0, {}};
  bool overflow = false;
  for (int64_t part = 0; part < stream.parts; ++part) {
    out.below += below[part];
    overflow = overflow || n_found[part] > part_room;
    if (!overflow) out.found.insert(out.found.end(), found[part].begin(), found[part].begin() + n_found[part]);
    found[part] = {};
  }
  const int64_t within = static_cast<int64_t>(out.found.size());
  if (!overflow) {
    for (T x : out.found)
      if (std::isnan(x)) return {nan, nan, 0, {}};
    if (rank >= out.below && next < out.below + within) {
      std::tie(out.low, out.high) = select_pair(out.found, rank - out.below, next - out.below);
      return out;
    }
  }
  out.found.clear();
  if (select_by_digits(stream, rank, &out.low)) select_by_digits(stream, next, &out.high);
  return out;
}

// How many values of the stream are at or below a threshold between the two statistics.
template <class T>
int64_t count_at_most(const Stream<T>& stream, const OrderStatistics<T>& statistics, T threshold) {
  if (!statistics.found.empty())
    return statistics.below + std::count_if(statistics.found.begin(), statistics.found.end(),
                                            [=](T x) { return x <= threshold; });
  std::vector<int64_t> counts(stream.parts, 0);
  stream.for_each(stream.parts, [&](int64_t part) {
    stream.visit_part(part, [&](const T* x, int64_t n) {
      for (int64_t k = 0; k < n; ++k) counts[part] += x[k] <= threshold;
    });
  });
  int64_t total = 0;
  for (int64_t count : counts) total += count;
  return total;
}

}  // namespace vrm
