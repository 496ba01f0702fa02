// One fiber per CUDA thread: stacks, the switch between them, and what the sanitizers are told about the switch.
//
//   -fsanitize=address   is told of each change of stack
//   -fsanitize=thread    sees each fiber as a thread of its own; a switch orders nothing, so that the only
//                        happens-before edges are those that barriers and fences make (acquire, release)
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

#define FUSEDRES_UNINSTRUMENTED __attribute__((no_sanitize("thread", "address", "undefined"), noinline))

namespace fusedres::emulator {

constexpr size_t kStackBytes = 128 << 10;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* address_sanitizer = nullptr;
  void* thread_sanitizer = nullptr;
};

// In its scope ThreadSanitizer ignores reads and writes: they are the emulator's, not the kernel's.
struct Quiet {
#if defined(__SANITIZE_THREAD__)
  Quiet() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Quiet() {}
#endif
};

inline void release([[maybe_unused]] char* order) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(order);
#endif
}

inline void acquire([[maybe_unused]] char* order) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(order);
#endif
}

#if !defined(__x86_64__)
#error "the context switch below is for x86-64"
#endif
__attribute__((naked, noinline)) inline void swap_stacks(void** /*save*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

// Finished fibers are kept for later threads: a launch has thousands of threads. The end of a launch, or of a block,
// orders the earlier life of a fiber, which ThreadSanitizer remembers, before the later one.
class Fibers {
 public:
  Fiber take() {
    if (free_.empty()) {
      void* memory =
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) {
        std::perror("fusedres emulator: no memory for a fiber's stack");
        std::abort();
      }
      Fiber fiber;
      fiber.stack = static_cast<char*>(memory);
#if defined(__SANITIZE_THREAD__)
      fiber.thread_sanitizer = __tsan_create_fiber(0);
#endif
      free_.push_back(fiber);
    }
    Fiber fiber = free_.back();
    free_.pop_back();
    return fiber;
  }
  void give_back(const Fiber& fiber) { free_.push_back(fiber); }

 private:
  std::vector<Fiber> free_;
};

// The stack that launch() was called on, as AddressSanitizer reports it.
struct CallerStack {
  const void* bottom = nullptr;
  size_t size = 0;
};

inline void prepare(Fiber& fiber, void (*entry)()) {
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
  *--top = nullptr;  // where a return from entry would go
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers that swap_stacks pops
  fiber.stack_pointer = top;
}

// A new fiber calls this first.
FUSEDRES_UNINSTRUMENTED inline void entered([[maybe_unused]] CallerStack& caller) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &caller.bottom, &caller.size);
#endif
}

// `to` without a stack of its own is the caller. A dying fiber is never switched back to.
FUSEDRES_UNINSTRUMENTED inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] const CallerStack& caller,
                                                 [[maybe_unused]] bool dying) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(dying ? nullptr : &from.address_sanitizer, to.stack ? to.stack : caller.bottom,
                                 to.stack ? kStackBytes : caller.size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.thread_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(from.address_sanitizer, &bottom, &size);
#endif
}

}  // namespace fusedres::emulator
