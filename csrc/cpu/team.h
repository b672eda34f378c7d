// One parallel region for a whole graph: every thread runs the same phases, with a barrier between them. Opening a region a
// phase instead costs more than the phases of a small batch take.
#pragma once

#include "runtime.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <limits>
#include <mutex>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vrm {

class Team {
 public:
  // Whatever a thread throws ends the region for all of them, at the barrier that ends the phase it was thrown in: a
  // thread that is still at the barrier before must not leave there, or the others would wait for it.
  struct Shared {
    std::exception_ptr error;
    std::mutex error_lock;
    std::atomic<int64_t> failed_phase{std::numeric_limits<int64_t>::max()};
    std::atomic<int64_t> arrived{0};  // at barriers, by all threads
    std::atomic<int> ended{0};        // phases; an int is what a thread can sleep on
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

  // body(team) on `threads` of torch's threads, or inline inside someone else's parallel region.
  template <class Body> static void run(int64_t threads, const Body& body) {
    Shared shared;
    const auto member = [&](int64_t rank, int64_t size) {
      Team team(rank, size, shared);
      try {
        body(team);
      } catch (const Cancelled&) {
      }
    };
    run_members(
        threads,
        [](void* context, int64_t rank, int64_t size) { (*static_cast<decltype(&member)>(context))(rank, size); },
        const_cast<void*>(static_cast<const void*>(&member)));
    if (shared.error) std::rethrow_exception(shared.error);
  }

 private:
  template <class Body> void guarded(const Body& body) {
    try {
      body();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(shared_.error_lock);
      shared_.error = std::current_exception();
      shared_.failed_phase = std::min<int64_t>(shared_.failed_phase.load(), phase_);
    }
  }

  void barrier() {
    if (size_ > 1) {
      if (shared_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size_ * (phase_ + 1)) {
        shared_.ended.store(phase_ + 1, std::memory_order_release);
        shared_.ended.notify_all();
      } else {
        for (int n = 0; n < kSpins && shared_.ended.load(std::memory_order_acquire) <= phase_; ++n) pause();
        while (shared_.ended.load(std::memory_order_acquire) <= phase_) shared_.ended.wait(phase_);
      }
    }
    if (shared_.failed_phase <= phase_++) throw Cancelled();
  }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  // Milliseconds, as OpenMP's own barriers spin: a thread that sleeps on a busy machine has its processor back only after
  // everyone else's turn, many times the whole loss.
  static constexpr int kSpins = 100000;
  const int64_t rank_, size_;
  int phase_ = 0;  // barriers passed
  Shared& shared_;
};

}  // namespace vrm
