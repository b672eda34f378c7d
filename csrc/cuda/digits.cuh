// Stage 3 of graphs that are more than a block's work, or whose entropies come tile by tile: the threshold by counting
// digits of their keys.
//
// Two passes in float32: 14 bits, counted in shared memory, because few of these digits occur and often; then the other
// 18 behind the two prefixes that hold the rank and its successor, which is a few in a hundred of the entropies, spread
// over all bins. Each pass may compute the entropies again. Groups of 512 bins are counted too, so that finding a rank
// takes two looks.
#pragma once

#include "order.cuh"
#include "problem.h"

namespace vrm {
namespace cuda {

constexpr int kFirstBits = 14, kNextBits = 18, kGroupBits = 9;
constexpr int kGroups = 1 << (kNextBits - kGroupBits);
constexpr int64_t kDigits = (int64_t{1} << kNextBits) + kGroups;  // of a prefix: bins, then groups
template <class T> constexpr int kPasses = sizeof(T) == 4 ? 2 : 4;  // 14 + 18; 14 + 18 + 18 + 14
template <class T> VRM_HOST_DEVICE constexpr int digit_bits(int pass) {
  return pass == 0 || pass == 3 ? kFirstBits : kNextBits;
}
template <class T> VRM_HOST_DEVICE constexpr int digit_shift(int pass) {
  int shift = 8 * static_cast<int>(sizeof(T));
  for (int k = 0; k <= pass; ++k) shift -= digit_bits<T>(k);
  return shift;
}
constexpr int64_t kCountBytes = int64_t{sizeof(unsigned)} << kFirstBits;

// Some rows of a tile a block.
template <class T> int64_t count_blocks(const Tile<T>& tile, int64_t most) {
  const int64_t blocks = ceil_div(tile.rows * tile.columns, int64_t{1} << 15);
  const int64_t limit = most < tile.rows ? most : tile.rows;
  return blocks < limit ? blocks : limit;
}

template <class T> __global__ void __launch_bounds__(kThreads, 3)
    count_kernel(const __grid_constant__ Problem<T> p, int which, const __grid_constant__ Tile<T> tile, int pass) {
  const Graph<T>& g = p.graph[which];
  unsigned* counts = reinterpret_cast<unsigned*>(shared_memory());  // of the first digit's bins; then of both groups
  const int counted = pass == 0 ? 1 << kFirstBits : 2 * kGroups;
  for (int k = thread_index(); k < counted; k += kThreads) counts[k] = 0;
  __syncthreads();
  const uint64_t prefix[2] = {pass == 0 ? 0 : g.status->prefix[0], pass == 0 ? 0 : g.status->prefix[1]};
  const int bits = digit_bits<T>(pass), shift = digit_shift<T>(pass);
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  for (int64_t i = blockIdx.x; i < tile.rows; i += gridDim.x) {
    const T* h = tile.entropy + i * tile.entropy_ld;
    const int64_t self = g.exclude_self ? tile.row + i - tile.column : -1;
#pragma unroll 4
    for (int64_t j = thread_index(); j < tile.columns; j += kThreads) {
      if (j == self) continue;
      const T x = h[j];
      const uint64_t key = to_key(x);
      if (pass == 0) {
        if (!(x == x)) atomicOr(&g.status->nan, 1);
        atomicAdd(&counts[key >> shift], 1u);
        continue;
      }
      const uint64_t before = key >> shift >> bits;
      if (before != prefix[0] && before != prefix[1]) continue;
      const int of = before != prefix[0], digit = static_cast<int>(key >> shift & mask);
      atomicAdd(&g.digits[of * kDigits + digit], 1ull);
      atomicAdd(&counts[of * kGroups + (digit >> kGroupBits)], 1u);
    }
  }
  __syncthreads();
  unsigned long long* groups = g.digits + kDigits - kGroups;
  for (int k = thread_index(); k < counted; k += kThreads) {
    const unsigned long long count = counts[k];
    if (count == 0) continue;
    if (pass == 0) {
      atomicAdd(&g.digits[k], count);
      atomicAdd(&groups[k >> kGroupBits], count);
    } else {
      atomicAdd(&groups[k / kGroups * kDigits + k % kGroups], count);
    }
  }
}

// Finds the digit of both ranks in a pass's histogram, and after the last gives the threshold. One block.
struct AdvanceState {
  Located located;
  int64_t digit[2], rest[2];
};

template <class T> __global__ void __launch_bounds__(kRankThreads)
    advance_kernel(const __grid_constant__ Problem<T> p, int which, int pass) {
  const Graph<T>& g = p.graph[which];
  Status<T>& status = *g.status;
  AdvanceState& state = *reinterpret_cast<AdvanceState*>(shared_memory());
  const bool two = pass > 0 && status.prefix[0] != status.prefix[1];
  const bool last = g.rank + 1 >= g.edges;  // the rank's successor is itself
#pragma unroll 1
  for (int k = 0; k < 2; ++k) {
    const unsigned long long* bins = g.digits + (k == 1 && two ? kDigits : 0);
    const int64_t rank = pass > 0 ? status.rest[k] : g.rank + (k == 1 && !last);
    locate<1>(bins + kDigits - kGroups, kGroups, rank, state.located);
    const int64_t group = state.located.bin, rest = state.located.rest;
    __syncthreads();
    locate<1>(bins + (group << kGroupBits), 1 << kGroupBits, rest, state.located);
    if (thread_index() == 0) {
      state.digit[k] = group << kGroupBits | state.located.bin;
      state.rest[k] = state.located.rest;
    }
    __syncthreads();
  }
  if (thread_index() != 0) return;
  for (int k = 0; k < 2; ++k) {
    status.prefix[k] = (pass > 0 ? status.prefix[k] << digit_bits<T>(pass) : 0) | static_cast<uint64_t>(state.digit[k]);
    status.rest[k] = state.rest[k];
  }
  if (pass + 1 < kPasses<T>) return;
  T low, high;
  from_key(status.prefix[0], low);
  from_key(status.prefix[1], high);
  status.threshold = status.nan != 0 ? kNotANumber<T> : interpolate(low, high, g.lerp_weight);
}

}  // namespace cuda
}  // namespace vrm
