// The pruning threshold: joint entropies, and an exact order statistic of them without a sort.
//
// Floats are mapped to unsigned integers of the same order and found digit by digit: each pass counts the next digit of
// the keys that have the prefix found so far. sorted[rank] and sorted[rank + 1] are followed at once, each with a
// prefix and a histogram of its own. Counts are integers: their sums do not depend on the order.
#pragma once

#include "../block.cuh"
#include "../order.cuh"

#include "graph.h"

namespace vrm {
namespace cuda {
namespace steps {

// H[i][j] = -sum_k P[i][k] L[j][k] of a small graph, 32 x 32 edges a task.
template <class T> struct Entropy {
  __host__ __device__ static int64_t tasks(const EdgeTile<T>& tile) {
    return ceil_div(tile.rows, kTile) * ceil_div(tile.columns, kTile);
  }

  __device__ static void run(const Graph<T>& g, const EdgeTile<T>& tile, int64_t task, char* shared) {
    Strip<T>* strip = reinterpret_cast<Strip<T>*>(shared);
    const int64_t wide = ceil_div(tile.columns, kTile);
    const int64_t i0 = task / wide * kTile, j0 = task % wide * kTile;  // of the tile
    const auto load = [&](Strip<T>& to, const Side<T>& side, int64_t v0, int64_t count, int64_t k0) {
      load_strip(to, side.factor.first.vertex_stride != 1, count, g.depth - k0,
                 [&](int v, int k) { return side.factor.at(v0 + v, k0 + k); });
    };
    T total[kOwn] = {};
    for (int64_t k0 = 0; k0 < g.depth; k0 += kDepth) {
      load(strip[0], g.a, tile.row + i0, tile.rows - i0, k0);
      load(strip[1], g.b, tile.column + j0, tile.columns - j0, k0);
      __syncthreads();
      T sum[kOwn] = {};  // of each strip apart: a running sum over all classes would lose digits that decide edges
      multiply_strips(strip[0], strip[1], sum);
#pragma unroll
      for (int r = 0; r < kOwn; ++r) total[r] -= sum[r];
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const int64_t i = i0 + warp_index() * kOwn + r, j = j0 + lane_index();
      if (i < tile.rows && j < tile.columns) tile.entropy[i * tile.entropy_ld + j] = total[r];
    }
  }
};

// Counts one pass's digits of the entropies of a tile. Task by task into shared memory, then into the histogram.
template <class T> struct Histogram {
  static constexpr int64_t kTaskElements = 16384;
  static constexpr int64_t kSharedBytes = 2 * kBins * sizeof(unsigned);

  __host__ __device__ static int64_t rows_of_task(const EdgeTile<T>& tile) {
    return tile.columns < kTaskElements ? kTaskElements / tile.columns : 1;
  }
  __host__ __device__ static int64_t tasks(const EdgeTile<T>& tile) { return ceil_div(tile.rows, rows_of_task(tile)); }

  __device__ static void run(const Graph<T>& g, const EdgeTile<T>& tile, int64_t task, int pass, char* shared) {
    unsigned* counts = reinterpret_cast<unsigned*>(shared);
    const uint64_t prefix0 = g.status->prefix[0], prefix1 = g.status->prefix[1];
    const bool two = prefix0 != prefix1;
    const int bins = two ? 2 * kBins : kBins;  // of the second value its own, unless it has gone with the first so far
    for (int bin = thread_index(); bin < bins; bin += kThreads) counts[bin] = 0;
    __syncthreads();
    const int bits = digit_bits<T>(pass), shift = digit_shift<T>(pass);
    const int64_t first = task * rows_of_task(tile);
    const int64_t rows = rows_of_task(tile) < tile.rows - first ? rows_of_task(tile) : tile.rows - first;
    for (int64_t r = warp_index(); r < rows; r += kWarps) {
      const int64_t i = first + r;
      const T* h = tile.entropy + i * tile.entropy_ld;
      const int64_t self = tile.row + i + g.self - tile.column;
      for (int64_t j0 = 0; j0 < tile.columns; j0 += 32) {
        const int64_t j = j0 + lane_index();
        int bin = -1;
        if (j < tile.columns && j != self) {
          const T x = h[j];
          if (pass == 0 && !(x == x)) atomicAdd(&g.status->nan, 1ull);
          const uint64_t key = to_key(x), prefix = pass == 0 ? 0 : key >> (shift + bits);
          const int digit = static_cast<int>(key >> shift) & ((1 << bits) - 1);
          if (prefix == prefix0)
            bin = digit;
          else if (two && prefix == prefix1)
            bin = kBins + digit;
        }
        // Neighbours mostly share their first digit: one addition for all lanes of a bin.
        const unsigned same = __match_any_sync(kFullWarp, bin);
        if (bin >= 0 && __ffs(static_cast<int>(same)) - 1 == lane_index()) atomicAdd(&counts[bin], __popc(same));
      }
    }
    __syncthreads();
    unsigned long long* total = &g.status->histogram[pass][0][0];
    for (int bin = thread_index(); bin < bins; bin += kThreads)
      if (counts[bin] != 0) atomicAdd(&total[bin], static_cast<unsigned long long>(counts[bin]));
  }
};

// Finds the digit of both ranks in a pass's histogram, and after the last pass the threshold. One block a graph.
template <class T> struct Advance {
  static constexpr int kBinsOfThread = kBins / kThreads;

  __device__ static void run(const Graph<T>& g, int pass, char* shared) {
    int64_t* room = reinterpret_cast<int64_t*>(shared);
    int64_t* found = room + kWarps;  // of each rank: bin, rest of the rank, elements in the bin
    Status<T>* status = g.status;
    const bool two = status->prefix[0] != status->prefix[1];
    if (thread_index() < 6) found[thread_index()] = 0;
    __syncthreads();
    int64_t here[kBinsOfThread], before = 0;  // elements of this thread's bins, and of all bins before them
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      if (which == 0 || two) {
        const unsigned long long* histogram = &status->histogram[pass][which][thread_index() * kBinsOfThread];
        int64_t mine = 0;
#pragma unroll
        for (int k = 0; k < kBinsOfThread; ++k) mine += here[k] = static_cast<int64_t>(histogram[k]);
        before = block_sum_before(mine, room);
      }
      const int64_t rank = status->rank[which];
      int64_t below = before;
#pragma unroll
      for (int k = 0; k < kBinsOfThread; ++k) {
        if (rank >= below && rank < below + here[k]) {
          found[3 * which] = thread_index() * kBinsOfThread + k;
          found[3 * which + 1] = rank - below;
          found[3 * which + 2] = here[k];
        }
        below += here[k];
      }
    }
    __syncthreads();
    if (thread_index() != 0) return;
    for (int which = 0; which < 2; ++which) {
      status->prefix[which] = status->prefix[which] << digit_bits<T>(pass) | static_cast<uint64_t>(found[3 * which]);
      status->rank[which] = found[3 * which + 1];
    }
    if (pass + 1 < kPasses<T>) return;
    T low, high;
    from_key(status->prefix[0], low);
    from_key(status->prefix[1], high);
    const T value = status->nan != 0 ? kNotANumber<T> : interpolate(low, high, static_cast<T>(g.lerp_weight));
    // What lies at or below the threshold: all up to one of the two values, and no value lies between them.
    const int64_t next = g.rank + 1 < g.edges ? g.rank + 1 : g.rank;
    const bool both = value >= high;
    status->kept = value == value ? (both ? next - found[4] + found[5] : g.rank - found[1] + found[2]) : 0;
    status->threshold = value;
  }
};

// Where a selection begins; the rest of it and the histograms are zero.
template <class T> __device__ inline void begin_selection(const Graph<T>& g) {
  if (g.keep_all) g.status->kept = g.edges;
  g.status->rank[0] = g.rank;
  g.status->rank[1] = g.rank + 1 < g.edges ? g.rank + 1 : g.rank;
}

}  // namespace steps
}  // namespace cuda
}  // namespace vrm
