#include "select.h"

#include "relation_graph.h"
#include "runtime.h"

namespace vrm {

template <class T>
void count_matrix(const T* x, int64_t rows, int64_t columns, int64_t stride, int64_t prefix, int shift, int bits,
                  int64_t* counts) {
  const int64_t size = int64_t{1} << bits, parts = rows * columns < 16 * size ? 1 : num_threads();
  std::vector<std::vector<int64_t>> partial(parts, std::vector<int64_t>(size, 0));
  Team::run(parts, [&](Team& team) {
    team.for_each(parts, [&](int64_t part) {
      std::vector<int32_t> few(kCountSets * size, 0);
      const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
      const int64_t most = (int64_t{1} << 30) / std::max<int64_t>(1, columns) + 1;  // rows that cannot overflow a count
      for (int64_t i = begin; i < end; ++i) {
        count_digits(x + i * stride, columns, prefix, shift, bits, few.data());
        if (i + 1 < end && (i + 1 - begin) % most != 0) continue;
        for (int64_t d = 0; d < kCountSets * size; ++d) partial[part][d % size] += few[d];
        few.assign(few.size(), 0);
      }
    });
  });
  for (const auto& of_part : partial)
    for (int64_t d = 0; d < size; ++d) counts[d] += of_part[d];
}

template <class T>
Outside split_matrix(const T* x, int64_t rows, int64_t columns, int64_t stride, T low, T high, std::vector<T>& inside) {
  Stream<T> stream;
  stream.n = rows * columns;
  stream.parts = std::max<int64_t>(1, std::min({num_threads(), rows, stream.n >> 14}));
  stream.visit_part = [&](int64_t part, const Run<T>& visit) {
    for (int64_t i = rows * part / stream.parts; i < rows * (part + 1) / stream.parts; ++i)
      visit(x + i * stride, columns);
  };
  Selection<T> selection;
  selection.bracket_low = low, selection.bracket_high = high;
  Team::run(stream.parts, [&](Team& team) { split(team, stream, stream.n, selection); });
  inside = std::move(selection.split.inside);
  return selection.split.outside;
}

template <class T> void order_statistics(const T* x, int64_t n, int64_t rank, T* low, T* high) {
  const int64_t threads = num_threads();
  Stream<T> stream;
  stream.n = n;
  stream.parts = std::max<int64_t>(1, std::min<int64_t>(threads, n >> 14));
  stream.visit_part = [&](int64_t part, const Run<T>& visit) {
    const int64_t begin = n * part / stream.parts, end = n * (part + 1) / stream.parts;
    visit(x + begin, end - begin);
  };
  stream.sample = [&](uint64_t draw) { return x[draw % static_cast<uint64_t>(n)]; };
  Selection<T> selection;
  const int64_t room = std::min(n, kFoundBytes / static_cast<int64_t>(sizeof(T)));
  Team::run(stream.parts, [&](Team& team) { select(team, stream, rank, room, selection); });
  *low = selection.low;
  *high = selection.high;
}

template <class T> T lerp(T low, T high, double weight) {
  if (weight == 0) return low;  // beside an infinity a product would make NaN of it
  const T w = static_cast<T>(weight), difference = high - low;
  const T factor = w < T(0.5) ? w : w - T(1), base = w < T(0.5) ? low : high;
  if (lerp_is_fused<T>()) return std::fma(factor, difference, base);
  const volatile T product = factor * difference;  // rounded, whatever the compiler may contract
  return base + product;
}

template void count_matrix(const float*, int64_t, int64_t, int64_t, int64_t, int, int, int64_t*);
template void count_matrix(const double*, int64_t, int64_t, int64_t, int64_t, int, int, int64_t*);
template Outside split_matrix(const float*, int64_t, int64_t, int64_t, float, float, std::vector<float>&);
template Outside split_matrix(const double*, int64_t, int64_t, int64_t, double, double, std::vector<double>&);
template void order_statistics(const float*, int64_t, int64_t, float*, float*);
template void order_statistics(const double*, int64_t, int64_t, double*, double*);
template float lerp(float, float, double);
template double lerp(double, double, double);

}  // namespace vrm
