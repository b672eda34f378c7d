// Where the time goes: wall time of each stage of a graph, summed over calls until read. For the benchmarks.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace vrm {

enum class Stage { softmax,
                   center,
                   pack,
                   entropy,
                   threshold,
                   edges,
                   gradient,
                   count };
inline std::atomic<int64_t> stage_nanoseconds[static_cast<int>(Stage::count)];

class StageTimer {
 public:
  // One thread of a team counts.
  explicit StageTimer(Stage stage, bool counts = true)
      : stage_(stage), counts_(counts), start_(std::chrono::steady_clock::now()) {}
  ~StageTimer() {
    if (!counts_) return;
    const auto elapsed = std::chrono::steady_clock::now() - start_;
    stage_nanoseconds[static_cast<int>(stage_)].fetch_add(
        std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count(), std::memory_order_relaxed);
  }
  StageTimer(const StageTimer&) = delete;
  StageTimer& operator=(const StageTimer&) = delete;

 private:
  const Stage stage_;
  const bool counts_;
  const std::chrono::steady_clock::time_point start_;
};

}  // namespace vrm
