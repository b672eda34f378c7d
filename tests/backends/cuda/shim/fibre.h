// Switching between fibres: a few instructions on x86-64, ucontext elsewhere.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace shim {

// Zero pages until touched.
inline char* new_stack(int64_t bytes) {
  void* p = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("cuda_shim: no memory for a fibre's stack");
  return static_cast<char*>(p);
}

#if defined(__x86_64__)

struct Context {
  void* stack;
};

extern "C" void cuda_shim_switch(void** save, void* load);
asm(R"(
.text
.type cuda_shim_switch, @function
cuda_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_shim_switch, .-cuda_shim_switch
)");

inline void switch_context(Context& from, Context& to) { cuda_shim_switch(&from.stack, to.stack); }

inline void begin_context(Context& context, char* stack, int64_t bytes, void (*run)()) {
  void** top = reinterpret_cast<void**>(stack + bytes) - 1;
  *top = nullptr;  // run never returns; it starts as after a call, 8 bytes off a multiple of 16
  *--top = reinterpret_cast<void*>(run);
  context.stack = top - 6;
}

#else

using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

inline void begin_context(Context& context, char* stack, int64_t bytes, void (*run)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = static_cast<size_t>(bytes);
  context.uc_link = nullptr;
  makecontext(&context, run, 0);
}

#endif

}  // namespace shim
