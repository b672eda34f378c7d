// Working memory: a stack of slabs, given back when the arena ends and usable again after reset().
//
// Large slabs ask the system for huge pages: a graph touches tens of megabytes once, and with 4 KB pages the faults and
// the address translation would cost more than the arithmetic of packing.
#pragma once

#include "graph.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vrm {

class Arena {
 public:
  template <class T> T* take(int64_t n) {
    const int64_t bytes = (n * static_cast<int64_t>(sizeof(T)) + kAlignBytes - 1) / kAlignBytes * kAlignBytes;
    for (; current_ < slabs_.size(); ++current_, used_ = 0)
      if (slabs_[current_].size - used_ >= bytes) return static_cast<T*>(bump(bytes));
    add_slab(bytes);
    return static_cast<T*>(bump(bytes));
  }

  void reset() {
    current_ = 0;
    used_ = 0;
  }

  int64_t size() const {
    int64_t total = 0;
    for (const Slab& slab : slabs_) total += slab.size;
    return total;
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Slab {
    std::unique_ptr<void, Free> data;
    int64_t size;
  };
  static constexpr int64_t kHugePage = int64_t{2} << 20;

  void* bump(int64_t bytes) {
    void* at = static_cast<char*>(slabs_[current_].data.get()) + used_;
    used_ += bytes;
    return at;
  }

  void add_slab(int64_t bytes) {
    const int64_t previous = slabs_.empty() ? int64_t{128} << 10 : slabs_.back().size;
    int64_t size = std::max(bytes, std::min(2 * previous, 4 * kHugePage));
    const bool huge = size >= kHugePage;
    const int64_t unit = huge ? kHugePage : 4096;
    size = (size + unit - 1) / unit * unit;
    void* data = nullptr;
    if (posix_memalign(&data, static_cast<size_t>(unit), static_cast<size_t>(size)) != 0) throw std::bad_alloc();
#if defined(__linux__)
    if (huge) madvise(data, static_cast<size_t>(size), MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
    slabs_.push_back({std::unique_ptr<void, Free>(data), size});
    current_ = slabs_.size() - 1;
    used_ = 0;
  }

  std::vector<Slab> slabs_;
  size_t current_ = 0;
  int64_t used_ = 0;
};

// Borrows the memory of an earlier call, and leaves it to the next if it is small: training calls the loss thousands of
// times with one shape, and having the system clear fresh pages takes as long as the threshold and the packing together.
class BorrowedArena {
 public:
  BorrowedArena() {
    for (auto& place : spares())
      if ((arena_ = place.exchange(nullptr)) != nullptr) return;
    arena_ = new Arena();
  }
  ~BorrowedArena() {
    arena_->reset();
    if (arena_->size() <= kMostKept)
      for (auto& place : spares()) {
        Arena* none = nullptr;  // the first free place: the next call's graphs find their own thread's memory again
        if (place.compare_exchange_strong(none, arena_)) return;
      }
    delete arena_;
  }
  BorrowedArena(const BorrowedArena&) = delete;
  BorrowedArena& operator=(const BorrowedArena&) = delete;
  Arena& operator*() { return *arena_; }

 private:
  static constexpr int64_t kMostKept = int64_t{96} << 20;
  static std::array<std::atomic<Arena*>, 2>& spares() {  // two small graphs at a time
    static std::array<std::atomic<Arena*>, 2> places{};
    return places;
  }
  Arena* arena_;
};

}  // namespace vrm
