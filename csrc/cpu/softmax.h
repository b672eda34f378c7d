// The softmaxes and the cross-entropies of both views, which the graphs' entropies and gradients start from.
#pragma once

#include "relation_graph.h"
#include "stages.h"
#include "team.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace vrm {

template <class T> class SoftmaxRun {
 public:
  // Looks at the labels: throws where one is no class.
  explicit SoftmaxRun(const SoftmaxInput<T>& input) : in_(input), kernels_(kernels<T>()) {
    double divisor = static_cast<double>(in_.samples);
    if (in_.labels != nullptr) {
      divisor = 0;
      for (int64_t i = 0; i < in_.samples; ++i) {
        const int64_t label = in_.labels[i];
        if (label == in_.ignore_index) continue;
        if (label < 0 || label >= in_.classes)
          throw std::out_of_range("label " + std::to_string(label) + " of sample " + std::to_string(i) +
                                  " is out of bounds: the classes are 0 to " + std::to_string(in_.classes - 1));
        divisor += in_.weight == nullptr ? 1 : static_cast<double>(in_.weight[label]);
      }
    }
    scale_ = divisor == 0 ? 0 : 1 / divisor;
    sums_.assign(2 * ((in_.samples + kRows - 1) / kRows), 0.0);
  }

  void run(Team& team) {
    const StageTimer timer(Stage::softmax, team.leads());
    team.for_each(static_cast<int64_t>(sums_.size()), [&](int64_t task) {
      const int64_t begin = task / 2 * kRows, end = std::min(in_.samples, begin + kRows);
      for (int64_t i = begin; i < end; ++i) sums_[task] += row(in_.views[task % 2], i);
    });
  }

  // The mean, as the labels and weights count.
  double cross_entropy(int view) const {
    double sum = 0;
    for (size_t task = view; task < sums_.size(); task += 2) sum += sums_[task];
    return sum * scale_;
  }

 private:
  static constexpr int64_t kRows = 16;  // of a task

  double row(const typename SoftmaxInput<T>::View& view, int64_t i) const {
    const int64_t at = i * in_.classes;
    const auto from = [at](auto* matrix) { return matrix == nullptr ? nullptr : matrix + at; };
    const bool counts = in_.labels == nullptr || in_.labels[i] != in_.ignore_index;
    const T smoothing = static_cast<T>(in_.label_smoothing);
    return kernels_.softmax_row({view.logits + at, in_.classes, from(view.probs), from(view.log_probs),
                                 view.cross_entropy && counts, from(in_.target), in_.weight,
                                 in_.labels == nullptr ? 0 : in_.labels[i], T(1) - smoothing,
                                 smoothing / static_cast<T>(in_.classes), scale_, from(view.grad)});
  }

  const SoftmaxInput<T>& in_;
  const Kernels<T>& kernels_;
  double scale_;
  std::vector<double> sums_;  // of each task
};

}  // namespace vrm
