// Exact order statistics without sorting and without a second copy of the data.
//
// The values come as a stream that can be replayed (stored, or recomputed bit for bit). A sample brackets the wanted
// rank; one pass then counts what lies below the bracket and collects the few values inside it. Where the bracket
// missed, or ties fill it, passes over 16-bit digits of order-preserving integer keys find the values instead: also
// exact.
#pragma once

#include "graph.h"
#include "team.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace vrm {

constexpr int64_t kFoundBytes = int64_t{48} << 20;  // of values inside a bracket

template <class T> using Run = std::function<void(const T* x, int64_t n)>;

// A replayable stream of n values in `parts` parts that may be visited concurrently.
template <class T> struct Stream {
  int64_t n;
  int64_t parts;
  std::function<void(int64_t part, const Run<T>& visit)> visit_part;
  std::function<T(uint64_t draw)> sample;  // a value chosen by 64 random bits; close to the stream's is enough
};

// Two neighbouring order statistics, and what a team shares on the way to them.
template <class T> struct Selection {
  T low, high;  // sorted[rank], sorted[min(rank + 1, n - 1)]; NaN if any value is
  int64_t below = 0;     // values below the bracket ...
  std::vector<T> found;  // ... and the values inside it; empty if the digit passes were needed
  bool done = false;

  T bracket_low, bracket_high;
  std::vector<T> sample;
  std::vector<std::vector<T>> found_by_part;
  std::vector<int64_t> counts;
  std::vector<std::vector<int64_t>> digit_counts;
  uint64_t prefix;  // digits found so far, and the rank among the values that begin with them
  int64_t rank;
  bool nan = false;
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

// Signed integers in the order of the floats, -0 and 0 being one: vrm_kernels/graph/selection.py cuts digits from them.
inline int32_t to_signed_key(float x) {
  int32_t s;
  x += 0.0f;
  std::memcpy(&s, &x, sizeof(x));
  return s ^ ((s >> 31) & 0x7fffffff);
}
inline int64_t to_signed_key(double x) {
  int64_t s;
  x += 0.0;
  std::memcpy(&s, &x, sizeof(x));
  return s ^ ((s >> 63) & 0x7fffffffffffffff);
}
inline float from_signed_key(int32_t s) {
  float x;
  s ^= (s >> 31) & 0x7fffffff;
  std::memcpy(&x, &s, sizeof(x));
  return x;
}
inline double from_signed_key(int64_t s) {
  double x;
  s ^= (s >> 63) & 0x7fffffffffffffff;
  std::memcpy(&x, &s, sizeof(x));
  return x;
}

// Counts in counts[digit] the values whose key has `prefix` above the digit, or all values where nothing is above. The
// digit is the `bits` bits of the key from `shift` on; n < 2^31. Neighbours often share a digit, and an increment must
// not wait for the one before: kCountSets sets of counts take turns, and are added up afterwards.
constexpr int64_t kCountSets = 4;
template <class T>
void count_digits(const T* x, int64_t n, int64_t prefix, int shift, int bits, int32_t* counts) {
  using Key = decltype(to_signed_key(T()));
  const Key size = Key{1} << bits, mask = size - 1;
  if (shift + bits == static_cast<int>(sizeof(T)) * 8) {
    const Key top = size / 2;  // the sign: negative keys come first
    int64_t k = 0;
    for (; k + kCountSets <= n; k += kCountSets)
      for (int s = 0; s < kCountSets; ++s) ++counts[s * size + (((to_signed_key(x[k + s]) >> shift) & mask) ^ top)];
    for (; k < n; ++k) ++counts[((to_signed_key(x[k]) >> shift) & mask) ^ top];
    return;
  }
  const Key wanted = static_cast<Key>(prefix);
  const int rest = shift + bits;
  // The floats with the prefix lie between two; a bound that is NaN lets everything pass, and the key decides.
  const Key first = static_cast<Key>(static_cast<std::make_unsigned_t<Key>>(wanted) << rest);
  const T low = from_signed_key(first), high = from_signed_key(static_cast<Key>(first | ((Key{1} << rest) - 1)));
  constexpr int64_t piece = 1024;
  T found[piece + kAlignBytes];  // split() stores whole registers
  for (int64_t begin = 0; begin < n; begin += piece) {
    int64_t n_found = 0;
    kernels<T>().split(x + begin, std::min(piece, n - begin), low, high, found, piece, &n_found);
    for (int64_t k = 0; k < n_found; ++k) {
      const Key key = to_signed_key(found[k]);
      counts[(k % kCountSets) * size + ((key >> shift) & mask)] += (key >> rest) == wanted;
    }
  }
}

inline uint64_t mix(uint64_t x) {  // splitmix64: a fixed pseudo-random sequence
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Finds sorted[rank] by 16-bit digits of the keys; NaN if a value is NaN. All threads of a team call it, and share
// memory.
template <class T>
void select_by_digits(Team& team, const Stream<T>& stream, int64_t rank, Selection<T>& shared, T& value) {
  using U = typename Key<T>::type;
  constexpr int bits = sizeof(T) * 8;
  U prefix = 0;
  for (int shift = bits - 16; shift >= 0; shift -= 16) {
    team.once([&] {
      shared.digit_counts.assign(stream.parts, std::vector<int64_t>(1 << 16, 0));
      shared.counts.assign(stream.parts, 0);
    });
    team.for_each(stream.parts, [&](int64_t part) {
      stream.visit_part(part, [&](const T* x, int64_t n) {
        for (int64_t k = 0; k < n; ++k) {
          shared.counts[part] += std::isnan(x[k]);
          const U key = to_key(x[k]);
          if (shift + 16 == bits || key >> (shift + 16) == prefix) ++shared.digit_counts[part][(key >> shift) & 0xffff];
        }
      });
    });
    // By one thread, behind a barrier on either side: the next pass clears the counts that all would read.
    team.once([&] {
      shared.nan = std::any_of(shared.counts.begin(), shared.counts.end(), [](int64_t count) { return count > 0; });
      shared.prefix = static_cast<uint64_t>(prefix);
      shared.rank = rank;
      if (shared.nan) return;
      U digit = 0;
      for (;; ++digit) {
        int64_t here = 0;
        for (const auto& counts : shared.digit_counts) here += counts[digit];
        if (shared.rank < here) break;
        shared.rank -= here;
      }
      shared.prefix = static_cast<U>(static_cast<U>(prefix << 15) << 1) | digit;
    });
    if (shared.nan) return team.once([&] { value = std::numeric_limits<T>::quiet_NaN(); });
    prefix = static_cast<U>(shared.prefix);
    rank = shared.rank;
  }
  team.once([&] { value = from_key<T>(prefix); });
}

// Finds two values between which sorted[rank] of n values very likely lies, from a sample of them, which it reorders.
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

// Finds sorted[rank] and sorted[next] of an array by brackets until little is left. The order of `values` is lost.
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

// All threads of a team call it. `room` bounds how many values are collected.
template <class T>
void select(Team& team, const Stream<T>& stream, int64_t rank, int64_t room, Selection<T>& shared) {
  const int64_t next = std::min(rank + 1, stream.n - 1);
  const double n = static_cast<double>(stream.n);
  // Larger samples cost more and leave fewer values inside the bracket.
  const int64_t m = static_cast<int64_t>(std::min(n, std::clamp(std::pow(n, 0.6), 256.0, 262144.0)));
  constexpr int64_t piece = 1024;
  team.once([&] { shared.sample.resize(m); });
  team.for_each((m + piece - 1) / piece, [&](int64_t k) {
    for (int64_t s = k * piece; s < std::min(m, (k + 1) * piece); ++s) shared.sample[s] = stream.sample(mix(s));
  });
  team.once([&] {
    for (T x : shared.sample)
      if (std::isnan(x)) {
        shared.low = shared.high = x;
        shared.done = true;
        return;
      }
    double share;
    std::tie(shared.bracket_low, shared.bracket_high) = bracket(shared.sample, rank, n, &share);
    room = std::min(room, 4096 * stream.parts + static_cast<int64_t>(2 * share * n)) / stream.parts;
    shared.found_by_part.assign(stream.parts, std::vector<T>(room + kAlignBytes));  // split() stores whole registers
    shared.counts.assign(2 * stream.parts, 0);
  });
  if (shared.done) return;
  team.for_each(stream.parts, [&](int64_t part) {
    std::vector<T>& found = shared.found_by_part[part];
    int64_t below = 0, n_found = 0;
    stream.visit_part(part, [&](const T* x, int64_t count) {
      below += kernels<T>().split(x, count, shared.bracket_low, shared.bracket_high, found.data(),
                                  static_cast<int64_t>(found.size()) - kAlignBytes, &n_found);
    });
    shared.counts[2 * part] = below;
    shared.counts[2 * part + 1] = n_found;
  });
  team.once([&] {
    bool overflow = false;
    for (int64_t part = 0; part < stream.parts; ++part) {
      std::vector<T>& found = shared.found_by_part[part];
      const int64_t n_found = shared.counts[2 * part + 1];
      shared.below += shared.counts[2 * part];
      overflow = overflow || n_found > static_cast<int64_t>(found.size()) - kAlignBytes;
      if (!overflow) shared.found.insert(shared.found.end(), found.begin(), found.begin() + n_found);
      found = {};
    }
    const int64_t within = static_cast<int64_t>(shared.found.size());
    for (T x : shared.found)
      if (std::isnan(x)) shared.nan = true;
    if (shared.nan) {
      shared.low = shared.high = std::numeric_limits<T>::quiet_NaN();
      shared.done = true;
    } else if (!overflow && rank >= shared.below && next < shared.below + within) {
      std::tie(shared.low, shared.high) = select_pair(shared.found, rank - shared.below, next - shared.below);
      shared.done = true;
    } else {
      shared.found.clear();
    }
  });
  if (shared.done) return;
  select_by_digits(team, stream, rank, shared, shared.low);
  select_by_digits(team, stream, next, shared, shared.high);
}

// Counts the values of the stream at or below a threshold between the two statistics. All threads of a team call it.
template <class T>
int64_t count_at_most(Team& team, const Stream<T>& stream, Selection<T>& shared, T threshold) {
  const auto at_most = [=](T x) { return x <= threshold; };
  if (!shared.found.empty()) return shared.below + std::count_if(shared.found.begin(), shared.found.end(), at_most);
  team.once([&] { shared.counts.assign(stream.parts, 0); });
  team.for_each(stream.parts, [&](int64_t part) {
    stream.visit_part(part, [&](const T* x, int64_t n) { shared.counts[part] += std::count_if(x, x + n, at_most); });
  });
  int64_t total = 0;
  for (int64_t count : shared.counts) total += count;
  return total;
}

}  // namespace vrm
