// Exact order statistics without sorting and without a second copy of the data.
//
// The values come as a stream that can be replayed (stored, or recomputed bit for bit). A sample brackets the wanted
// rank; one pass then counts what lies below the bracket and at its ends, and collects the few values inside it. Where
// the bracket missed, passes over 16-bit digits of order-preserving integer keys find the values instead: also exact.
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

// Where the values of a stream, or of a part of it, lie to a bracket.
template <class T> struct Split {
  Outside outside;
  std::vector<T> inside;
  int64_t n_inside = 0;  // more than `inside` has where there was no room
};

// Two neighbouring order statistics, and what a team shares on the way to them.
template <class T> struct Selection {
  T low, high;  // sorted[rank], sorted[min(rank + 1, n - 1)]; NaN if any value is
  bool bracketed = false;  // whether both were found by the bracket, and `split` is whole

  T bracket_low, bracket_high;
  Split<T> split;
  std::vector<Split<T>> split_by_part;
  std::vector<T> sample;
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

// Counts in counts[digit] the values whose key has `prefix` above the digit, or all values where nothing is above. The
// digit is the `bits` bits of the key from `shift` on; n < 2^31. Neighbours often share a digit, and an increment must
// not wait for the one before: kCountSets sets of counts take turns, and are added up afterwards.
constexpr int64_t kCountSets = 4;
template <class T>
void count_digits(const T* x, int64_t n, int64_t prefix, int shift, int bits, int32_t* counts) {
  using Key = decltype(to_signed_key(T()));
  const Key size = Key{1} << bits, mask = size - 1, wanted = static_cast<Key>(prefix);
  const int above = shift + bits;
  const bool leading = above == static_cast<int>(sizeof(T)) * 8;
  const Key flip = leading ? size / 2 : 0;  // the sign: negative keys come first
  for (int64_t k = 0; k < n; ++k) {
    const Key key = to_signed_key(x[k]);
    counts[(k % kCountSets) * size + (((key >> shift) & mask) ^ flip)] += leading || (key >> above) == wanted;
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
template <class T> std::pair<T, T> bracket(std::vector<T>& sample, int64_t rank, double n) {
  // A sample of m is wrong by about sqrt(m p (1 - p)) positions; four of those are rarely exceeded.
  const double m = static_cast<double>(sample.size()), p = static_cast<double>(rank) / n;
  const int64_t slack = 2 + static_cast<int64_t>(4 * std::sqrt(m * p * (1 - p))), centre = static_cast<int64_t>(p * m);
  const auto order_statistic = [&](int64_t k) {
    std::nth_element(sample.begin(), sample.begin() + k, sample.end());
    return sample[k];
  };
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
    const auto [low, high] = bracket(sample, rank, static_cast<double>(values.size()));
    std::vector<T> inside(values.size() + kAlignBytes);
    int64_t n = 0;
    const int64_t size = static_cast<int64_t>(values.size());
    const Outside outside = kernels<T>().split(values.data(), size, low, high, inside.data(), size, &n);
    const int64_t before = outside.below + outside.at_low;
    if (rank < before || next >= before + n || 2 * n > size) break;
    inside.resize(n);
    values = std::move(inside);
    rank -= before, next -= before;
  }
  std::nth_element(values.begin(), values.begin() + rank, values.end());
  const T low = values[rank];
  return {low, next == rank ? low : *std::min_element(values.begin() + next, values.end())};
}

// One pass: where the values lie to the bracket. A part collects at most `room`. All threads of a team call it.
template <class T> void split(Team& team, const Stream<T>& stream, int64_t room, Selection<T>& shared) {
  constexpr int64_t piece = int64_t{1} << 14;
  team.once([&] { shared.split_by_part.assign(stream.parts, {}); });
  team.for_each(stream.parts, [&](int64_t part) {
    Split<T> own;
    stream.visit_part(part, [&](const T* x, int64_t n) {
      for (int64_t begin = 0; begin < n; begin += piece) {
        const int64_t count = std::min(piece, n - begin), most = std::min(room, own.n_inside + count);
        const size_t needed = most + kAlignBytes;  // the kernel stores whole registers
        if (own.inside.size() < needed) own.inside.resize(std::max(needed, 2 * own.inside.size()));
        own.outside += kernels<T>().split(x + begin, count, shared.bracket_low, shared.bracket_high, own.inside.data(),
                                          most, &own.n_inside);
      }
    });
    own.inside.resize(std::min(room, own.n_inside));
    shared.split_by_part[part] = std::move(own);
  });
  team.once([&] {
    Split<T>& whole = shared.split = std::move(shared.split_by_part[0]);
    for (int64_t part = 1; part < stream.parts; ++part) {
      const Split<T>& other = shared.split_by_part[part];
      whole.outside += other.outside;
      whole.n_inside += other.n_inside;
      whole.inside.insert(whole.inside.end(), other.inside.begin(), other.inside.end());
    }
    shared.split_by_part.clear();
  });
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
  const auto is_nan = [](T x) { return std::isnan(x); };
  team.once([&] {
    shared.nan = std::any_of(shared.sample.begin(), shared.sample.end(), is_nan);
    if (!shared.nan) std::tie(shared.bracket_low, shared.bracket_high) = bracket(shared.sample, rank, n);
  });
  if (!shared.nan) split(team, stream, room / stream.parts, shared);
  team.once([&] {
    const auto& [outside, inside, n_inside] = shared.split;
    shared.nan = shared.nan || std::any_of(inside.begin(), inside.end(), is_nan);
    if (shared.nan) {
      shared.low = shared.high = std::numeric_limits<T>::quiet_NaN();
      return;
    }
    const int64_t before = outside.below + outside.at_low, last = n_inside - 1;
    shared.bracketed = n_inside == static_cast<int64_t>(inside.size()) && rank >= outside.below &&
                       next < before + n_inside + outside.at_high;
    if (!shared.bracketed) return;
    const auto clamped = [&](int64_t k) { return std::clamp<int64_t>(k - before, 0, last); };
    std::pair<T, T> pair;
    if (n_inside > 0) pair = select_pair(inside, clamped(rank), clamped(next));
    const auto value = [&](int64_t k, T found) {
      return k < before ? shared.bracket_low : k > before + last ? shared.bracket_high
                                                                 : found;
    };
    shared.low = value(rank, pair.first), shared.high = value(next, pair.second);
  });
  if (shared.nan || shared.bracketed) return;
  select_by_digits(team, stream, rank, shared, shared.low);
  select_by_digits(team, stream, next, shared, shared.high);
}

// Counts the values of the stream at or below a threshold between the two statistics. All threads of a team call it.
template <class T>
int64_t count_at_most(Team& team, const Stream<T>& stream, Selection<T>& shared, T threshold) {
  const auto at_most = [=](T x) { return x <= threshold; };
  if (shared.bracketed) {
    const auto& [outside, inside, n_inside] = shared.split;
    return outside.below + (at_most(shared.bracket_low) ? outside.at_low : 0) +
           std::count_if(inside.begin(), inside.end(), at_most) + (at_most(shared.bracket_high) ? outside.at_high : 0);
  }
  team.once([&] { shared.counts.assign(stream.parts, 0); });
  team.for_each(stream.parts, [&](int64_t part) {
    stream.visit_part(part, [&](const T* x, int64_t n) { shared.counts[part] += std::count_if(x, x + n, at_most); });
  });
  int64_t total = 0;
  for (int64_t count : shared.counts) total += count;
  return total;
}

}  // namespace vrm
