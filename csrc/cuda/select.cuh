// Stage 3: the pruning threshold, exactly torch.quantile's, and the totals of the batch. docs/gpu.md has the stages.
//
// One block finds an order statistic of numbers that are not too many by counting digits of integers in their order,
// their keys. More are narrowed first, by brackets. Nothing but counts decides, not the order in which threads add.
#pragma once

#include "entropy.cuh"
#include "order.cuh"

#include <type_traits>

namespace vrm {
namespace cuda {

constexpr int kRankThreads = 1024;  // of a block that orders numbers
constexpr int kBatchOfThread = 8;  // numbers in flight

template <class T> using Key = std::conditional_t<sizeof(T) == 4, uint32_t, unsigned long long>;
template <class T> __device__ __forceinline__ Key<T> key_of(T x) { return static_cast<Key<T>>(to_key(x)); }
template <class T> constexpr int kRounds = (8 * static_cast<int>(sizeof(T)) + kDigitBits - 1) / kDigitBits;
template <class T> VRM_HOST_DEVICE constexpr int bits_left(int round) {  // of a key, before a round
  const int bits = 8 * static_cast<int>(sizeof(T)) - round * kDigitBits;
  return bits > 0 ? bits : 0;
}

// Where a rank lies in a histogram: the bin, the rest of the rank among the bin's numbers, how many those are, and how
// many there are in all. Behind the end it is the last bin.
struct Place {
  int64_t bin, rest, count, total;
};
struct SelectState {
  int64_t room[kRankThreads / 32];
  Place place;
  double sums[kRankThreads / 32];
  unsigned long long least;
  unsigned counts[kBins];
};

// By a block, whose threads share the bins evenly.
template <class V>
__device__ __forceinline__ Place locate(const V* counts, int bins, int64_t rank, SelectState& state) {
  const int own = bins / static_cast<int>(blockDim.x), first = thread_index() * own;
  int64_t mine = 0;
  for (int k = 0; k < own; ++k) mine += static_cast<int64_t>(counts[first + k]);
  int64_t below = block_sum_before(mine, state.room);
  if (first + own == bins) state.place.total = below + mine;
  for (int k = 0; k < own; ++k) {
    const int64_t here = static_cast<int64_t>(counts[first + k]);
    if (rank >= below && (rank < below + here || first + k + 1 == bins))
      state.place.bin = first + k, state.place.rest = rank - below, state.place.count = here;
    below += here;
  }
  __syncthreads();
  return state.place;
}

// Counts the digits that a round looks at, of those keys that begin with what is found: the lanes of a warp together.
template <class T>
__device__ __forceinline__ void count_digit(T x, bool valid, Key<T> found, int round, unsigned* counts) {
  const int shift = bits_left<T>(round + 1), bits = bits_left<T>(round) - shift;
  const Key<T> key = key_of(x);
  valid = valid && x == x && (key >> shift >> bits) == found;
  const int digit = valid ? static_cast<int>((key >> shift) & ((1u << bits) - 1)) : -1;
  const unsigned same = __match_any_sync(kFullWarp, digit);  // neighbours often share it
  if (valid && __ffs(static_cast<int>(same)) - 1 == lane_index())
    atomicAdd(&counts[digit], static_cast<unsigned>(__popc(same)));
}
template <class T> __device__ __forceinline__ Key<T> with_digit(Key<T> found, int round, int64_t digit) {
  return static_cast<Key<T>>(found << (bits_left<T>(round) - bits_left<T>(round + 1))) | static_cast<Key<T>>(digit);
}

// What is ordered: NaN is none of the numbers, nor is every `skip`-th from the first on; 0: none is left out.
template <class T> struct Numbers {
  const T* x;
  int64_t count, skip;

  __device__ T operator[](int64_t at) const {
    return at < count && (skip == 0 || at % skip != 0) ? x[at] : kNotANumber<T>;
  }
  // visit(number), and with NaN to fill up: the lanes of a warp together.
  template <class Visit> __device__ __forceinline__ void each(const Visit& visit) const {
    for (int64_t first = 0; first < count; first += kBatchOfThread * kRankThreads) {
      T batch[kBatchOfThread];
#pragma unroll
      for (int k = 0; k < kBatchOfThread; ++k) batch[k] = (*this)[first + k * kRankThreads + thread_index()];
#pragma unroll
      for (int k = 0; k < kBatchOfThread; ++k) visit(batch[k]);
    }
  }
};

// The key at a rank, the one at the next rank (the same, if there is none) if it is asked for, and how many there are
// in all. The numbers are read several times: a first-level cache has room for as many as one block is given.
template <class T> struct Ordered {
  Key<T> key, next;
  int64_t total;
};

template <class T>
__device__ __forceinline__ Ordered<T> order(const Numbers<T>& x, int64_t rank, bool with_next, SelectState& state) {
  Ordered<T> found = {};
  Place place = {};
  if (thread_index() == 0) state.least = ~0ull;
#pragma unroll 1
  for (int round = 0; round < kRounds<T>; ++round) {
    for (int k = thread_index(); k < kBins; k += kRankThreads) state.counts[k] = 0;
    __syncthreads();
    x.each([&](T number) { count_digit(number, true, found.key, round, state.counts); });
    __syncthreads();
    place = locate(state.counts, kBins, rank, state);
    if (round == 0) found.total = place.total;
    found.key = with_digit<T>(found.key, round, place.bin);
    rank = place.rest;
  }
  found.next = found.key;
  if (!with_next || rank + 1 < place.count) return found;
  unsigned long long least = ~0ull;
  x.each([&](T number) {
    if (number == number && key_of(number) > found.key && key_of(number) < least) least = key_of(number);
  });
  least = ~warp_max(~least);
  if (lane_index() == 0) atomicMin(&state.least, least);
  __syncthreads();
  if (state.least != ~0ull) found.next = static_cast<Key<T>>(state.least);
  return found;
}

// ---- brackets --------------------------------------------------------------------------------------------------------

// A bracket's ends are keys. Those of entropies that are not stored come from a sample that is not rounded as the
// products are: around each end lies a zone of keys that are counted one by one.
constexpr int kZone = 4096;
template <class T> constexpr int64_t kCounters = 2 * kZone + 2 * kRounds<T> * kBins;
template <class T> __device__ __forceinline__ unsigned long long* zone_of(const Graph<T>& g, int level, int end) {
  return level == 0 && g.counters != nullptr ? g.counters + end * kZone : nullptr;
}
// Of a round of missed_kernel, and of the key at the rank (0) or at the next one (1).
template <class T> __device__ __forceinline__ unsigned long long* digits_of(const Graph<T>& g, int which, int round) {
  return g.counters + 2 * kZone + (which * kRounds<T> + round) * kBins;
}

template <class T> __device__ __forceinline__ Numbers<T> source_of(const Graph<T>& g, int level) {
  if (level == 0) return {g.entropy, g.rows * g.columns, g.exclude_self ? g.columns + 1 : 0};
  const int64_t inside = g.brackets[level - 1].count[kInside], room = g.level[level - 1].room;
  return {g.level[level - 1].collected, inside < room ? inside : room, 0};
}

// The wanted rank among a level's source; the nearest, where it is an end's.
template <class T> __device__ __forceinline__ int64_t rank_of(const Graph<T>& g, int level, int64_t count) {
  if (level == 0) return g.rank;
  const Bracket& before = g.brackets[level - 1];
  const int64_t rank = before.rank - before.count[kBelow] - before.count[kAtLow];
  return rank < 0 || count == 0 ? 0 : rank < count ? rank
                                                   : count - 1;
}

template <class T> __device__ __forceinline__ bool holds(const Graph<T>& g, int level) {
  const Bracket& b = g.brackets[level];
  const int64_t rank = b.rank - b.count[kBelow], next = rank + (g.lerp_weight > T(0));
  return rank >= 0 && next < b.count[kAtLow] + b.count[kInside] + b.count[kAtHigh] &&
         b.count[kInside] <= g.level[level].room;
}

// Where the k-th of a sample lies: multiples of a prime near 2^32 over the golden ratio spread evenly over any size.
template <class T> __device__ __forceinline__ int64_t sampled_place(const Numbers<T>& x, int64_t k) {
  const int64_t at = static_cast<int64_t>(static_cast<uint64_t>(k) * 2654435761u % static_cast<uint64_t>(x.count));
  return x.skip == 0 || at % x.skip != 0 ? at : at == 0 ? 1
                                                        : at - 1;
}

// The sample of entropies that are not stored: an edge a warp.
template <class T>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ Problem<T> p, int which) {
  const Graph<T>& g = p.graph[which];
  const int64_t k = blockIdx.x * int64_t{kWarps} + warp_index(), depth = g.entropy_depth;
  if (k >= g.level[0].sample) return;  // a whole warp
  const int64_t at = sampled_place(source_of(g, 0), k), i = at / g.columns, j = at % g.columns;
  T sum = 0;
  for (int64_t d = lane_index(); d < depth; d += 32)
    sum += load<T>(g.probs, i * depth + d) * load<T>(g.surprisals, j * depth + d);
  sum = warp_sum(sum);
  if (lane_index() == 0) g.sample[k] = sum;
}

// The ends of a level's bracket, and no counts yet. One block.
template <class T> __global__ void __launch_bounds__(kRankThreads, 1)
    bracket_kernel(const __grid_constant__ Problem<T> p, int which, int level) {
  const Graph<T>& g = p.graph[which];
  Bracket& b = g.brackets[level];
  const Numbers<T> source = source_of(g, level);
  const int64_t size = g.level[level].sample, count = level == 0 ? g.edges : source.count;
  const int64_t rank = rank_of(g, level, count);
  if (zone_of(g, level, 0) == nullptr)
    for (int64_t k = thread_index(); k < size; k += kRankThreads)
      g.sample[k] = count > 0 ? source.x[sampled_place(source, k)] : T(0);
  for (int64_t k = thread_index(); k < (zone_of(g, level, 0) != nullptr ? kCounters<T> : 0); k += kRankThreads)
    g.counters[k] = 0;
  __syncthreads();
  const double share = count > 1 ? static_cast<double>(rank) / static_cast<double>(count - 1) : 0;
  const int64_t middle = static_cast<int64_t>(share * static_cast<double>(size - 1));
#pragma unroll 1
  for (int end = 0; end < 2; ++end) {
    const int64_t at = middle + (end == 0 ? -g.level[level].reach : g.level[level].reach);
    Key<T> key = end == 0 ? 0 : static_cast<Key<T>>(~Key<T>(0));  // an end of the sample is none of the source
    if (at >= 0 && at < size)
      key = order<T>({g.sample, size, 0}, at, false, *reinterpret_cast<SelectState*>(shared_memory())).key;
    const Key<T> half = zone_of(g, level, end) != nullptr ? kZone / 2 : 0;
    if (thread_index() == 0) b.end[end] = key < half ? 0 : key - half;
  }
  if (thread_index() < kCounts) b.count[thread_index()] = 0;
  if (thread_index() == 0) b.rank = rank;
}

// How many of a level's source lie where to its bracket; those inside are collected. Some numbers of a tile a block:
// of entropies, or one row of what the level before collected.
constexpr int kCountOfThread = 16, kCountOfBlock = kCountOfThread * kThreads;
constexpr int64_t kCountBytes = (kWarps + 1) * sizeof(int64_t);

template <class T> __global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ Problem<T> p, int which, int level, const __grid_constant__ Tile<T> tile) {
  const Graph<T>& g = p.graph[which];
  Bracket& b = g.brackets[level];
  int64_t* room = reinterpret_cast<int64_t*>(shared_memory());
  const int64_t first = blockIdx.x * int64_t{kCountOfBlock};
  const int64_t count = level == 0 ? tile.rows * tile.columns : source_of(g, level).count;
  const uint32_t columns = static_cast<uint32_t>(tile.columns), begin = static_cast<uint32_t>(first % tile.columns);
  const bool self = level == 0 && g.exclude_self;
  if (first >= count) return;
  T x[kCountOfThread];
#pragma unroll
  for (int k = 0; k < kCountOfThread; ++k) {
    const uint32_t place = k * kThreads + thread_index(), j = (begin + place) % columns;
    const int64_t i = first / tile.columns + (begin + place) / columns;
    const bool mine = first + place < count && !(self && tile.row + i == tile.column + j);
    x[k] = mine ? tile.entropy[i * tile.entropy_ld + j] : kNotANumber<T>;
  }
  const Key<T> low = static_cast<Key<T>>(b.end[0]), high = static_cast<Key<T>>(b.end[1]);
  unsigned long long* zones = zone_of(g, level, 0);
  const Key<T> width = zones != nullptr ? kZone : 1;
  int64_t counts[kCounts] = {};
  unsigned inside = 0;  // a bit a number
#pragma unroll
  for (int k = 0; k < kCountOfThread; ++k) {
    const Key<T> key = key_of(x[k]);
    const int where = !(x[k] == x[k])      ? -1
                      : key < low          ? kBelow
                      : key - low < width  ? kAtLow
                      : key < high         ? kInside
                      : key - high < width ? kAtHigh
                                           : kAbove;
#pragma unroll
    for (int c = 0; c < kCounts; ++c) counts[c] += where == c;
    inside |= static_cast<unsigned>(where == kInside) << k;
    if (zones == nullptr) continue;
    const int bin = where == kAtLow    ? static_cast<int>(key - low)
                    : where == kAtHigh ? static_cast<int>(key - high) + kZone
                                       : -1;
    const unsigned same = __match_any_sync(kFullWarp, bin);
    if (bin >= 0 && __ffs(static_cast<int>(same)) - 1 == lane_index())
      atomicAdd(&zones[bin], static_cast<unsigned long long>(__popc(same)));
  }
  int64_t place = block_sum_before(counts[kInside], room);
#pragma unroll
  for (int c = 0; c < kCounts; ++c) {
    const int64_t total = block_sum(counts[c], room);
    if (thread_index() != 0) continue;
    const auto before = atomicAdd(reinterpret_cast<unsigned long long*>(&b.count[c]), total);
    if (c == kInside) room[kWarps] = static_cast<int64_t>(before);
  }
  __syncthreads();
  place += room[kWarps];
#pragma unroll
  for (int k = 0; k < kCountOfThread; ++k)
    if (inside >> k & 1u && place < g.level[level].room) g.level[level].collected[place++] = x[k];
}

// For several processes, whose counts add up: how many of x [rows, columns] have each digit of a round, of those that
// begin with a prefix; half of the blocks follow either one. Those of graph/selection.py are signed.
template <class T> __global__ void __launch_bounds__(kThreads)
    digits_kernel(const T* x, int64_t rows, int64_t columns, int64_t ld, const int64_t* prefixes, int round,
                  unsigned long long* digits) {
  unsigned* counts = reinterpret_cast<unsigned*>(shared_memory());
  const int of = blockIdx.x & 1;
  const uint64_t negative = round == 0 ? 0 : uint64_t{1} << (round * kDigitBits - 1);  // as many prefixes are
  const Key<T> found = round == 0 ? 0 : static_cast<Key<T>>(static_cast<uint64_t>(prefixes[of]) + negative);
  for (int k = thread_index(); k < kBins; k += kThreads) counts[k] = 0;
  __syncthreads();
  for (int64_t row = blockIdx.x / 2; row < rows; row += gridDim.x / 2)
    for (int64_t first = 0; first < columns; first += kThreads) {
      const int64_t column = first + thread_index();
      count_digit(column < columns ? x[row * ld + column] : kNotANumber<T>, true, found, round, counts);
    }
  __syncthreads();
  for (int k = thread_index(); k < kBins; k += kThreads)
    if (counts[k] != 0) atomicAdd(&digits[of * kBins + k], static_cast<unsigned long long>(counts[k]));
}

// ---- the threshold ---------------------------------------------------------------------------------------------------

// The leading digits of the key at the rank (0) or at the next one (1), as rounds of missed_kernel have found them.
template <class T>
__device__ __forceinline__ Key<T> found_digits(const Graph<T>& g, int which, int rounds, SelectState& state) {
  int64_t rank = g.rank + which < g.edges ? g.rank + which : g.rank;
  Key<T> found = 0;
  for (int round = 0; round < rounds; ++round) {
    const Place place = locate(digits_of(g, which, round), kBins, rank, state);
    found = with_digit<T>(found, round, place.bin);
    rank = place.rest;
  }
  return found;
}

// Where the first bracket of entropies that are not stored missed, all of them are those of this kernel, since products
// cannot depend on what the device finds; elsewhere it does nothing. A round counts digits of all, for either key with
// half of the blocks; what follows the last one writes a tile.
template <class T> constexpr int64_t kMissedBytes = kEntropyBytes<T> + sizeof(SelectState);

template <class T> __global__ void __launch_bounds__(kThreads, 2)
    missed_kernel(const __grid_constant__ Problem<T> p, int which, int round, const __grid_constant__ Tile<T> tile) {
  const Graph<T>& g = p.graph[which];
  if (holds(g, 0)) return;
  SelectState& state = *reinterpret_cast<SelectState*>(shared_memory() + kEntropyBytes<T>);
  const bool counts = round < kRounds<T>;
  const int keys = counts ? 2 : 1, of = blockIdx.x % keys;
  const Key<T> found = counts ? found_digits(g, of, round, state) : 0;
  for (int k = thread_index(); k < kBins; k += kThreads) state.counts[k] = 0;
  __syncthreads();
  for (int64_t task = blockIdx.x / keys; task < entropy_tasks(tile.rows, tile.columns); task += gridDim.x / keys)
    visit_entropies<true>(g, task, tile, [&](int64_t i, int64_t j, T entropy) {
      const bool inside = i < tile.rows && j < tile.columns;
      if (counts)
        count_digit(entropy, inside && !(g.exclude_self && i == j), found, round, state.counts);
      else if (inside)
        tile.entropy[i * tile.entropy_ld + j] = entropy;
    });
  __syncthreads();
  for (int k = thread_index(); k < kBins; k += kThreads)
    if (state.counts[k] != 0)
      atomicAdd(&digits_of(g, of, round)[k], static_cast<unsigned long long>(state.counts[k]));
}

template <class T> __device__ __forceinline__ void select_threshold(const Graph<T>& g, SelectState& state) {
  if (!g.ranked()) {
    if (thread_index() == 0) g.status->threshold = *g.given_threshold;
    return;
  }
  int held = 0;  // brackets, one after the other
  while (held < g.levels && holds(g, held)) ++held;
  Ordered<T> found = {};
  if (held == 0 && g.counters != nullptr) {
    found.key = found_digits(g, 0, kRounds<T>, state);
    found.next = found_digits(g, 1, kRounds<T>, state);
  } else {
    const Numbers<T> source = source_of(g, held);
    found = order(source, rank_of(g, held, source.count), g.lerp_weight > T(0), state);
  }
  int64_t numbers = found.total;  // of all entropies: those that are NaN are missing
  for (int level = held - 1; level >= 0; --level) {
    const Bracket& b = g.brackets[level];
    const int64_t at_low = b.count[kAtLow], inside = b.count[kInside], rank = b.rank - b.count[kBelow];
    const auto of_end = [&](int end, int64_t in_zone) {
      const unsigned long long* zone = zone_of(g, level, end);
      return static_cast<Key<T>>(b.end[end] + (zone == nullptr ? 0 : locate(zone, kZone, in_zone, state).bin));
    };
    const auto key_at = [&](int64_t k, Key<T> of_inside) {
      return k < at_low ? of_end(0, k) : k < at_low + inside ? of_inside
                                                             : of_end(1, k - at_low - inside);
    };
    // Where the rank is the lower end's, the next may be that of the first inside.
    found.next = key_at(rank + 1, rank < at_low ? found.key : found.next);
    found.key = key_at(rank, found.key);
  }
  if (thread_index() != 0) return;
  if (g.levels > 0) numbers = 0;
  for (int c = 0; c < kCounts && g.levels > 0; ++c) numbers += g.brackets[0].count[c];
  T low, high;
  from_key(found.key, low);
  from_key(found.next, high);
  g.status->threshold = numbers == g.edges ? interpolate(low, high, g.lerp_weight) : kNotANumber<T>;
}

// Sums over the rows of the batch, or of the vertices, in a fixed order.
template <class T> __device__ __forceinline__ void add_totals(const Problem<T>& p, SelectState& state) {
  const auto sum = [&](const auto* x, int64_t count) {
    double total = 0;
    for (int64_t k = thread_index(); k < count; k += kRankThreads) total += static_cast<double>(x[k]);
    return block_sum<kRankThreads / 32>(total, state.sums);
  };
  const Batch<T>& b = p.batch;
  double poison = 0;
  if (b.samples == 0) {
    for (int side = 0; side < 2; ++side) poison += sum(p.vectors.poison[side], p.vectors.count[side]);
  } else {
    poison = sum(b.poison, 2 * b.samples);
    for (int view = 0; view < 2; ++view) {
      const bool wanted = b.cross_entropy[view];
      const double loss = wanted ? sum(b.ce_losses + view * b.samples, b.samples) : 0;
      const double weight = wanted ? sum(b.ce_weights + view * b.samples, b.samples) : 0;
      const double divisor = weight != 0 ? weight : 1;  // a batch that counts nothing has the sum 0
      if (thread_index() == 0) {
        p.totals->cross_entropy[view] = loss / divisor;
        p.totals->divisor[view] = divisor;
      }
    }
  }
  if (thread_index() == 0) p.totals->poisoned = !(poison == 0);
}

// A block for the totals, one for the threshold of each graph from `first` on.
template <class T> __global__ void __launch_bounds__(kRankThreads)
    exact_kernel(const __grid_constant__ Problem<T> p, int first) {
  SelectState& state = *reinterpret_cast<SelectState*>(shared_memory());
  if (blockIdx.x > 0)
    select_threshold(p.graph[first + blockIdx.x - 1], state);
  else if (first == 0)
    add_totals(p, state);
}

}  // namespace cuda
}  // namespace vrm
