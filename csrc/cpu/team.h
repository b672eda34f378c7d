// One parallel region for a whole graph: every thread runs the same phases, with a barrier between them. Opening a region a
// phase instead costs more than the phases of a small batch take.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <limits>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace vrm {

class Team {
 public:
  // Whatever a thread throws ends the region for all of them, at the barrier that ends the phase it was thrown in: a
  // thread that is still at the barrier before must not leave there, or the others would wait for it.
  struct Shared {
    std::exception_ptr error;
    std::atomic<int64_t> failed_phase{std::numeric_limits<int64_t>::max()};
  };
  struct Cancelled {};

  Team(int64_t rank, int64_t size, Shared& shared) : rank_(rank), size_(size), shared_(shared) {}

  bool leads() const { return rank_ == 0; }

  // body(0) ... body(n - 1), shared out; all have ended when this returns.
  template <class Body> void for_each(int64_t n, const Body& body) {
    guarded([&] {
      for (int64_t k = rank_; k < n; k += size_) body(k);
    });
    barrier();
  }

  // body() on one thread, the one that called run().
  template <class Body> void once(const Body& body) {
    if (rank_ == 0) guarded(body);
    barrier();
  }

  // body(team) on `threads` threads, or inline inside someone else's parallel region.
  template <class Body> static void run(int64_t threads, const Body& body) {
    Shared shared;
    const auto member = [&](int64_t rank, int64_t size) {
      Team team(rank, size, shared);
      try {
        body(team);
      } catch (const Cancelled&) {
      }
    };
#if defined(_OPENMP)
    if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(static_cast<int>(threads))
      member(omp_get_thread_num(), omp_get_num_threads());
    } else
#endif
      member(0, 1);
    if (shared.error) std::rethrow_exception(shared.error);
  }

 private:
  template <class Body> void guarded(const Body& body) {
    try {
      body();
    } catch (...) {
#pragma omp critical(vrm_team_error)
      {
        shared_.error = std::current_exception();
        shared_.failed_phase = std::min(shared_.failed_phase.load(), phase_);
      }
    }
  }

  void barrier() {
    if (size_ > 1) {
#pragma omp barrier
    }
    if (shared_.failed_phase <= phase_++) throw Cancelled();
  }

  const int64_t rank_, size_;
  int64_t phase_ = 0;  // barriers passed
  Shared& shared_;
};

}  // namespace vrm
