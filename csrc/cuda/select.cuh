// Stage 3: the pruning threshold, exactly torch.quantile's, and the totals of the batch. A block a graph; those that
// are more than a block's work are selected by digits.cuh.
//
// The histogram that the entropies were counted in says which bin holds the threshold's rank: the candidates are that
// bin's entropies, and are ordered by counting their digits, 11 bits at a time. They are taken into shared memory in
// one pass over the graph; if they do not fit, each pass reads the graph again. Only counts decide, not the order in
// which threads add to them.
#pragma once

#include "entropy.cuh"
#include "order.cuh"

#include <type_traits>

namespace vrm {
namespace cuda {

constexpr int kDigitBits = 11;
constexpr int kBatchOfThread = 8;  // entropies in flight

// Of what shared memory is for, beside the candidates.
struct SelectState {
  Located located;
  double sums[kRankWarps];
  unsigned long long least;
  unsigned taken;
  unsigned counts[kBins];
};
template <class T> using Key = std::conditional_t<sizeof(T) == 4, uint32_t, unsigned long long>;
constexpr int64_t kSelectBytes = 96 << 10;  // what every supported device has for a block
template <class T> constexpr int64_t kCandidates = (kSelectBytes - int64_t{sizeof(SelectState)}) / sizeof(Key<T>);

// Calls visit(entropy) for all entropies of a graph, and with NaN to fill up: the lanes of a warp together.
template <class T, class Visit> __device__ __forceinline__ void visit_entropies(const Graph<T>& g, const Visit& visit) {
  const int64_t count = g.rows * g.columns;
  for (int64_t first = 0; first < count; first += kBatchOfThread * kRankThreads) {
    T x[kBatchOfThread];
#pragma unroll
    for (int k = 0; k < kBatchOfThread; ++k) {
      const int64_t at = first + k * kRankThreads + thread_index();
      x[k] = at < count ? g.entropy[at] : kNotANumber<T>;
    }
#pragma unroll
    for (int k = 0; k < kBatchOfThread; ++k) visit(x[k]);
  }
}

template <class T> __device__ __forceinline__ void select_threshold(const Graph<T>& g, char* shared) {
  SelectState& state = *reinterpret_cast<SelectState*>(shared);
  Key<T>* candidates = reinterpret_cast<Key<T>*>(shared + sizeof(SelectState));
  if (g.digits != nullptr) return;
  if (g.status->nan != 0) {
    if (thread_index() == 0) g.status->threshold = kNotANumber<T>;
    return;
  }
  const bool last = g.rank + 1 >= g.edges;  // the rank's successor is itself
  locate<kBins / kRankThreads>(g.status->histogram, kBins, g.rank, state.located);
  const int bin = state.located.bin;
  int64_t rest = state.located.rest, count = state.located.count;
  __syncthreads();
  int next_bin = bin;
  if (!last && rest + 1 == count) {
    locate<kBins / kRankThreads>(g.status->histogram, kBins, g.rank + 1, state.located);
    next_bin = state.located.bin;
    count += state.located.count;
  }
  if (thread_index() == 0) state.taken = 0, state.least = ~0ull;
  __syncthreads();

  const auto is_candidate = [&](T x) {
    const int b = x == x ? bin_of(x) : -1;
    return b == bin || b == next_bin;
  };
  const bool fit = count <= kCandidates<T>;
  if (fit)
    visit_entropies(g, [&](T x) {
      if (is_candidate(x)) candidates[atomicAdd(&state.taken, 1u)] = static_cast<Key<T>>(to_key(x));
    });
  __syncthreads();
  const auto visit_candidates = [&](const auto& visit) {  // visit(whether it is one, its key)
    if (!fit) return visit_entropies(g, [&](T x) { visit(is_candidate(x), static_cast<Key<T>>(to_key(x))); });
    for (int64_t first = 0; first < count; first += kRankThreads) {
      const int64_t at = first + thread_index();
      visit(at < count, at < count ? candidates[at] : Key<T>(0));
    }
  };

  Key<T> found = 0;  // the digits of the rank's key so far
  for (int shift = 8 * sizeof(T); shift > 0;) {
    const int bits = shift < kDigitBits ? shift : kDigitBits;
    shift -= bits;
    for (int k = thread_index(); k < kBins; k += kRankThreads) state.counts[k] = 0;
    __syncthreads();
    visit_candidates([&](bool valid, Key<T> key) {
      const bool counts = valid && (key >> shift >> bits) == found;
      const int digit = counts ? static_cast<int>((key >> shift) & ((1u << bits) - 1)) : -1;
      const unsigned same = __match_any_sync(kFullWarp, digit);
      if (counts && __ffs(static_cast<int>(same)) - 1 == lane_index())
        atomicAdd(&state.counts[digit], static_cast<unsigned>(__popc(same)));
    });
    __syncthreads();
    locate<kBins / kRankThreads>(state.counts, kBins, rest, state.located);
    found = static_cast<Key<T>>(found << bits | static_cast<Key<T>>(state.located.bin));
    rest = state.located.rest;
    __syncthreads();
  }
  const bool alone = rest + 1 >= state.located.count;  // the successor is a greater key
  if (alone && !last) {
    unsigned long long least = ~0ull;
    visit_candidates([&](bool valid, Key<T> key) {
      if (valid && key > found && key < least) least = key;
    });
    least = ~warp_max(~least);
    if (lane_index() == 0) atomicMin(&state.least, least);
    __syncthreads();
  }
  if (thread_index() != 0) return;
  T low, high;
  from_key(found, low);
  from_key(alone && !last ? state.least : found, high);
  g.status->threshold = interpolate(low, high, g.lerp_weight);
}

// Sums over the rows of the batch, or of the vertices, in a fixed order.
template <class T> __device__ __forceinline__ void add_totals(const Problem<T>& p, char* shared) {
  SelectState& state = *reinterpret_cast<SelectState*>(shared);
  const auto sum = [&](const auto* x, int64_t count) {
    double total = 0;
    for (int64_t k = thread_index(); k < count; k += kRankThreads) total += static_cast<double>(x[k]);
    return block_sum<kRankWarps>(total, state.sums);
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

template <class T>
__global__ void __launch_bounds__(kRankThreads) select_kernel(const __grid_constant__ Problem<T> p) {
  if (blockIdx.x == 0)
    add_totals(p, shared_memory());
  else
    select_threshold(p.graph[blockIdx.x - 1], shared_memory());
}

}  // namespace cuda
}  // namespace vrm
