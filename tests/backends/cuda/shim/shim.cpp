// The emulation behind cuda_runtime.h of this folder: fibres, barriers, and the checks of every access to memory.
//
// One launch runs at a time, all of it on the launching thread. Finding a fault ends the launch: cuda_shim's callers
// get std::runtime_error from run_grid, with the kernel, block and thread in it.

#include "cuda_runtime.h"

#include "fibre.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {
namespace {

constexpr int64_t kStackBytes = 64 << 10;
constexpr unsigned kFullWarp = 0xffffffffu;

enum class State { ready,
                   at_block_barrier,
                   at_grid_barrier,
                   at_warp_operation,
                   done };

// When and by whom.
struct Stamp {
  uint32_t grid_time = 0;  // 0: never; counts launches and grid-wide barriers
  int32_t block = 0, thread = 0;
  uint32_t block_time = 0, warp_time = 0;  // count the barriers that the thread has passed
};

// The accesses of a kind to a word: the last one, and who else made any that no barrier separates from it.
struct Accesses {
  Stamp last;
  bool blocks = false, warps = false, lanes = false;  // several, in one span of the grid's, block's or warp's time

  void add(const Stamp& s) {
    if (last.grid_time != s.grid_time)
      blocks = warps = lanes = false;
    else if (last.block != s.block)
      blocks = true;
    else if (last.block_time != s.block_time)
      warps = lanes = false;
    else if (last.thread / 32 != s.thread / 32)
      warps = true;
    else if (last.warp_time != s.warp_time)
      lanes = false;
    else if (last.thread != s.thread)
      lanes = true;
    last = s;
  }

  // Whether another thread made one of them without a barrier since.
  bool race_with(const Stamp& later) const {
    if (last.grid_time != later.grid_time) return false;
    if (blocks || last.block != later.block) return true;
    if (last.block_time != later.block_time) return false;
    if (warps || last.thread / 32 != later.thread / 32) return true;
    return last.warp_time == later.warp_time && (lanes || last.thread != later.thread);
  }
};

struct Word {  // of `granule` bytes
  Accesses writes, reads, atomics;
};

struct Buffer {
  const char *begin = nullptr, *end = nullptr;
  Access access = Access::scratch;
  int64_t granule = 4;
  std::vector<char> written;                   // a word each
  std::vector<std::unique_ptr<Word[]>> pages;  // made when first touched: most words of most arrays never are

  static constexpr int64_t kPage = 256;
  Buffer() = default;
  Buffer(const char* begin, const char* end, Access access, int64_t granule = 4)
      : begin(begin), end(end), access(access), granule(granule), written((end - begin + granule - 1) / granule),
        pages(written.size() / kPage + 1) {}
  Word& word(int64_t k) {
    auto& page = pages[k / kPage];
    if (!page) page = std::make_unique<Word[]>(kPage);
    return page[k % kPage];
  }
};

struct Fibre {
  State state = State::ready;
  int thread = 0, warp = 0;  // of the block; of the launch
  uint32_t block_time = 0, warp_time = 0;
  int64_t block = 0;
  Context context{};
  char* stack = nullptr;
};

struct Warp {
  unsigned arrived = 0;
  uint64_t given[32], result[2][32];
  int turn = 0;
};

struct Block {
  std::vector<char> memory;  // shared
  Buffer shared;
};

std::recursive_mutex one_at_a_time;
std::vector<std::unique_ptr<Buffer>> buffers;
Buffer* last_buffer = nullptr;
uint32_t grid_time = 0;
uint64_t order_seed = 0;
bool checking = true, known_device = true;
int64_t launches = 0, fibres_run = 0, multiply_adds[2] = {};
std::vector<std::string> kernels_run;

// Of the launch that is running.
std::vector<Fibre> fibres;
std::vector<Warp> warps;
std::vector<Block> blocks;
std::vector<char*> stacks;
Fibre* current = nullptr;
int lane_order = 0;  // lanes take turns in the order of their numbers xor this
Context scheduler;
Entry entry;
const void* arguments;
std::string kernel_name, fault;

void leave(State state) {
  Fibre* self = current;
  self->state = state;
  switch_context(self->context, scheduler);
}

void make_current(Fibre& fibre) {
  current = &fibre;
  threadIdx.x = static_cast<unsigned>(fibre.thread);
  blockIdx.x = static_cast<unsigned>(fibre.block);
}

[[noreturn]] void fail(const std::string& what) {
  fault = what + " in block " + std::to_string(current->block) + ", thread " + std::to_string(current->thread) +
          " of " + kernel_name;
  leave(State::done);
  __builtin_unreachable();
}

Stamp now() {
  return {grid_time, static_cast<int32_t>(current->block), current->thread, current->block_time, current->warp_time};
}

Buffer* buffer_at(const char* address) {
  Buffer& shared = blocks[current->block].shared;
  if (address >= shared.begin && address < shared.end) return &shared;
  if (last_buffer != nullptr && address >= last_buffer->begin && address < last_buffer->end) return last_buffer;
  auto it = std::upper_bound(buffers.begin(), buffers.end(), address,
                             [](const char* a, const std::unique_ptr<Buffer>& b) { return a < b->begin; });
  if (it == buffers.begin()) return nullptr;
  Buffer* buffer = std::prev(it)->get();
  if (address >= buffer->end) return nullptr;
  return last_buffer = buffer;
}

std::string describe(const Buffer& buffer, const char* address) {
  const bool shared = &buffer == &blocks[current->block].shared;
  return std::to_string(address - buffer.begin) + " bytes into a " + (shared ? "shared" : "global") + " array of " +
         std::to_string(buffer.end - buffer.begin);
}

enum class Kind { read,
                  write,
                  atomic };

bool watching() { return checking && current != nullptr; }

void check_access(const void* at, int64_t bytes, Kind kind) {
  if (!watching() || !fault.empty()) return;
  const char* address = static_cast<const char*>(at);
  if (address >= current->stack && address < current->stack + kStackBytes) return;
  Buffer* buffer = buffer_at(address);
  if (buffer == nullptr)
    for (const dim3* built_in : {&threadIdx, &blockIdx, &blockDim, &gridDim})
      if (address >= reinterpret_cast<const char*>(built_in) && address < reinterpret_cast<const char*>(built_in + 1))
        return;
  if (buffer == nullptr || address + bytes > buffer->end)
    fail(std::string(kind == Kind::read ? "read" : "write") + " of " + std::to_string(bytes) +
         " bytes outside of every array" + (buffer == nullptr ? "" : ": " + describe(*buffer, address)));
  const Stamp stamp = now();
  const int64_t first = (address - buffer->begin) / buffer->granule;
  const int64_t last = (address + bytes - 1 - buffer->begin) / buffer->granule;
  for (int64_t k = first; k <= last; ++k) {
    Word& word = buffer->word(k);
    if (buffer->access != Access::initialised && !buffer->written[k] && kind != Kind::write)
      fail("read of memory that nothing has written, " + describe(*buffer, address));
    const char* name = kind == Kind::read ? "read" : "write";
    if (word.writes.race_with(stamp) || (kind != Kind::atomic && word.atomics.race_with(stamp)))
      fail(std::string("race: ") + name + " after another thread's write, " + describe(*buffer, address));
    if (kind != Kind::read && word.reads.race_with(stamp))
      fail("race: write after another thread's read, " + describe(*buffer, address));
    (kind == Kind::read ? word.reads : kind == Kind::write ? word.writes
                                                           : word.atomics)
        .add(stamp);
    if (kind != Kind::read) buffer->written[k] = 1;
  }
}

void enter_fibre() {
  entry(arguments);
  leave(State::done);
}

// Releases everyone of [begin, end) from `barrier` if all are there.
bool release(size_t begin, size_t end, State barrier) {
  for (size_t k = begin; k < end; ++k)
    if (fibres[k].state != barrier) return false;
  for (size_t k = begin; k < end; ++k) {
    fibres[k].state = State::ready;
    ++fibres[k].block_time;
  }
  return true;
}

const char* where(State state) {
  switch (state) {
    case State::at_block_barrier: return "at __syncthreads";
    case State::at_grid_barrier: return "at the barrier of the grid";
    case State::at_warp_operation: return "in a warp operation";
    case State::done: return "done";
    case State::ready: return "ready";
  }
  return "";
}

std::string name_of(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "a kernel without a name";
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status),
                                                    std::free);
  return status == 0 ? name.get() : info.dli_sname;
}

void run_fibre(Fibre& fibre) {
  make_current(fibre);
  switch_context(scheduler, fibre.context);
  current = nullptr;
}

// Runs fibres [0, n) until all are done: a warp as far as its barriers let it, then another; warps and lanes in an order
// that changes at every turn if a seed is set. (Races are found by what barriers order, not by what happens to come first.)
void run_fibres(size_t n, size_t block_size) {
  std::mt19937_64 random(order_seed);
  std::vector<size_t> order(n / 32);
  for (size_t k = 0; k < order.size(); ++k) order[k] = k;
  for (;;) {
    if (order_seed != 0) std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    size_t done = 0;
    for (size_t warp : order) {
      Fibre* lanes = &fibres[warp * 32];
      for (bool again = true; again; progress |= again) {
        again = false;
        lane_order = order_seed != 0 ? static_cast<int>(random() % 32) : 0;
        for (int k = 0; k < 32; ++k) {
          Fibre& fibre = lanes[k ^ lane_order];
          if (fibre.state != State::ready) continue;
          again = true;
          run_fibre(fibre);
          if (!fault.empty()) return;
        }
      }
      for (size_t k = 0; k < 32; ++k) done += lanes[k].state == State::done;
    }
    if (done == n) return;
    for (size_t begin = 0; begin < n; begin += block_size)
      progress |= release(begin, begin + block_size, State::at_block_barrier);
    const bool all = release(0, n, State::at_grid_barrier);
    grid_time += all;
    if (progress || all) continue;
    const Fibre *first = &fibres[0], *other = first;  // stuck: name two that wait for different things
    for (const Fibre& fibre : fibres)
      if (fibre.state != first->state) other = &fibre;
    fault = std::string("deadlock: thread ") + std::to_string(first->thread) + " of block " +
            std::to_string(first->block) + " is " + where(first->state) + ", thread " + std::to_string(other->thread) +
            " of block " + std::to_string(other->block) + " " + where(other->state) + ", in " + kernel_name;
    return;
  }
}

}  // namespace

void sync_block() { leave(State::at_block_barrier); }
void sync_grid() { leave(State::at_grid_barrier); }

void sync_warp() {
  exchange(kFullWarp, 0);
  ++current->warp_time;
}

const uint64_t* exchange(unsigned mask, uint64_t value) {
  if (mask != kFullWarp) fail("a warp operation of part of a warp, which is not emulated,");
  Fibre* self = current;
  Warp& warp = warps[self->warp];
  const int lane = self->thread & 31;
  warp.given[lane] = value;
  warp.arrived |= 1u << lane;
  if (warp.arrived == kFullWarp) {
    warp.arrived = 0;
    warp.turn ^= 1;  // a lane that has not run yet may still want the last result
    std::copy(warp.given, warp.given + 32, warp.result[warp.turn]);
    const size_t first = static_cast<size_t>(self - fibres.data()) - lane;
    for (size_t k = first; k < first + 32; ++k) fibres[k].state = State::ready;
    return warp.result[warp.turn];
  }
  // On to the next lane without the scheduler, which costs half of the switches.
  self->state = State::at_warp_operation;
  Fibre* lanes = self - lane;
  for (int k = 1; k < 32; ++k) {
    Fibre& next = lanes[(((lane ^ lane_order) + k) & 31) ^ lane_order];
    if (next.state != State::ready) continue;
    make_current(next);
    switch_context(self->context, next.context);
    return warp.result[warp.turn];
  }
  switch_context(self->context, scheduler);
  return warp.result[warp.turn];
}

bool device_is_known() { return known_device; }

void drop_buffers() {
  buffers.clear();
  last_buffer = nullptr;
}

char* shared_memory() { return blocks[current->block].memory.data(); }

void note_atomic(const void* address, int bytes) { check_access(address, bytes, Kind::atomic); }
void note_product(int64_t count, bool half) { multiply_adds[half] += count; }

void expect_buffer(const void* address, int64_t bytes, Access access, int64_t granule) {
  const std::lock_guard<std::recursive_mutex> guard(one_at_a_time);
  const char *begin = static_cast<const char*>(address), *end = begin + bytes;
  const auto overlaps = [&](const auto& b) { return b->begin < end && begin < b->end; };
  if (access == Access::initialised)  // two inputs may be views of one tensor
    for (const auto& b : buffers)
      if (overlaps(b) && b->access == access) begin = std::min(begin, b->begin), end = std::max(end, b->end);
  buffers.erase(std::remove_if(buffers.begin(), buffers.end(), overlaps), buffers.end());
  auto buffer = std::make_unique<Buffer>(begin, end, access, granule);
  last_buffer = nullptr;
  buffers.insert(std::upper_bound(buffers.begin(), buffers.end(), begin,
                                  [](const char* a, const auto& b) { return a < b->begin; }),
                 std::move(buffer));
}

void note_written(const void* address, int64_t bytes) {
  const std::lock_guard<std::recursive_mutex> guard(one_at_a_time);
  const char* begin = static_cast<const char*>(address);
  for (auto& buffer : buffers) {
    const char *from = std::max(begin, buffer->begin), *to = std::min(begin + bytes, buffer->end);
    if (from < to)
      std::fill(buffer->written.begin() + (from - buffer->begin) / buffer->granule,
                buffer->written.begin() + (to - buffer->begin + buffer->granule - 1) / buffer->granule, 1);
  }
}

void forget_buffers() {
  const std::lock_guard<std::recursive_mutex> guard(one_at_a_time);
  int64_t missing = 0;
  for (const auto& buffer : buffers)
    if (checking && buffer->access == Access::output)
      missing += std::count(buffer->written.begin(), buffer->written.end(), 0);
  drop_buffers();
  if (missing > 0)
    throw std::runtime_error("cuda_shim: " + std::to_string(missing) + " words of the outputs were not written");
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, bool cooperative, Entry run, const void* context,
              const void* kernel) {
  const std::lock_guard<std::recursive_mutex> guard(one_at_a_time);
  kernel_name = name_of(kernel);
  kernels_run.push_back(kernel_name);
  ++launches;
  const size_t at_once = cooperative ? grid.x : 1, threads = block.x;
  while (stacks.size() < at_once * threads) stacks.push_back(new_stack(kStackBytes));
  entry = run;
  arguments = context;
  ++grid_time;
  blockDim = block, gridDim = grid;
  // Blocks of a launch may run in any order.
  std::vector<unsigned> first_blocks;
  for (unsigned b = 0; b < grid.x; b += static_cast<unsigned>(at_once)) first_blocks.push_back(b);
  std::mt19937_64 random(order_seed + 1);
  if (order_seed != 0) std::shuffle(first_blocks.begin(), first_blocks.end(), random);
  blocks.clear();
  blocks.resize(grid.x);
  for (unsigned first : first_blocks) {
    for (unsigned b = first; b < first + at_once; ++b) {
      Block& state = blocks[b];
      state.memory.assign(shared_bytes + 64, static_cast<char>(0xff));  // not a number
      state.shared = Buffer(state.memory.data(), state.memory.data() + shared_bytes, Access::scratch);
    }
    fibres.assign(at_once * threads, Fibre{});
    warps.assign(at_once * threads / 32, Warp{});
    for (size_t k = 0; k < fibres.size(); ++k) {
      Fibre& fibre = fibres[k];
      fibre.thread = static_cast<int>(k % threads);
      fibre.block = static_cast<int64_t>(first + k / threads);
      fibre.warp = static_cast<int>(k / 32);
      fibre.stack = stacks[k];
      begin_context(fibre.context, stacks[k], kStackBytes, enter_fibre);
    }
    fibres_run += static_cast<int64_t>(fibres.size());
    run_fibres(fibres.size(), threads);
    for (unsigned b = first; b < first + at_once; ++b) blocks[b] = Block{};
    if (!fault.empty()) break;
  }
  if (fault.empty()) return;
  drop_buffers();
  const std::string what = std::exchange(fault, std::string());
  throw std::runtime_error("cuda_shim: " + what);
}

}  // namespace shim

// ---- what the compiler calls before every access of a kernel (-fsanitize=thread) -----------------------------------

extern "C" {
#define VRM_HOOK_OF(name, bytes, kind)                                     \
  void __tsan_##name##bytes(void* at) {                                    \
    if (shim::watching()) shim::check_access(at, bytes, shim::Kind::kind); \
  }
#define VRM_HOOK(bytes)                    \
  VRM_HOOK_OF(read, bytes, read)           \
  VRM_HOOK_OF(write, bytes, write)         \
  VRM_HOOK_OF(unaligned_read, bytes, read) \
  VRM_HOOK_OF(unaligned_write, bytes, write)
VRM_HOOK(1)
VRM_HOOK(2)
VRM_HOOK(4)
VRM_HOOK(8)
VRM_HOOK(16)
void __tsan_read_range(void* at, long bytes) { shim::check_access(at, bytes, shim::Kind::read); }
void __tsan_write_range(void* at, long bytes) { shim::check_access(at, bytes, shim::Kind::write); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// For the tests, through ctypes.
void cuda_shim_set_order(uint64_t seed) { shim::order_seed = seed; }
// Without the checks of every access the emulation is three times as fast.
void cuda_shim_set_checks(int on) { shim::checking = on != 0; }
// Whether the kernels were compiled for the device.
void cuda_shim_set_known_device(int on) { shim::known_device = on != 0; }
int64_t cuda_shim_launches() { return shim::launches; }
// Of the products that the forms ask torch for: of float16, or of what is computed in.
int64_t cuda_shim_multiply_adds(int half) { return shim::multiply_adds[half]; }
void cuda_shim_forget_kernels() { shim::kernels_run.clear(); }
// Their names, a line each, into `out`; returns how many bytes that takes.
int64_t cuda_shim_kernels(char* out, int64_t room) {
  std::string names;
  for (const auto& name : shim::kernels_run) names += name + "\n";
  if (out != nullptr) names.copy(out, static_cast<size_t>(room));
  return static_cast<int64_t>(names.size());
}
}
