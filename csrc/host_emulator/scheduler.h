// Runs a kernel's grid on the CPU, in a seeded random order of blocks and threads, several blocks in flight.
//
// What makes it find bugs: shared memory is an exact-size heap block full of NaN; every barrier is counted
// per thread; a barrier that not all threads reach is a deadlock and is reported, and so is an instruction of a whole
// warp that not all of its lanes reach; an asynchronous copy lands at once or as late as it may; under ThreadSanitizer
// only barriers and fences order memory. An error prints what it found and aborts.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include <cuda_runtime_api.h>

#include "fibers.h"

namespace fusedres::emulator {

struct Block;

// 16 bytes on their way into shared memory; those from `bytes` on become zeros.
struct Copy {
  void* to;
  const void* from;
  int bytes;
  int group;
};

struct Thread : Fiber {
  Block* block = nullptr;
  uint3 index{};
  bool done = false;
  int barriers = 0;
  const uint64_t* waits_for = nullptr;  // the generation of a barrier, which was `seen` on arrival
  uint64_t seen = 0;
  const char* waits_at = nullptr;
  std::vector<Copy> copies;  // in flight, oldest first
  int committed = 0;         // groups of copies
};

// An instruction that all lanes of a warp execute together, such as a product of tensor cores.
struct Warp {
  const char* instruction = nullptr;
  int arrived = 0;
  uint64_t generation = 0;
  void* lanes[32] = {};  // what each lane brought
};

struct Block {
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int alive = 0;
  int arrived = 0;
  uint64_t generation = 0;
  // One object for even and one for odd generations: with a single one, a fast thread would publish its later
  // writes to a slow one that is still leaving the barrier.
  char order[2] = {};
  std::map<const void*, std::unique_ptr<unsigned char, void (*)(void*)>> shared;
};

struct Device {
  int multiprocessors = 2;
  int l2_bytes = 1 << 16;
};

struct State {
  dim3 grid, block;
  std::function<void()> kernel;
  std::mt19937 random{1};
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<unsigned> only_blocks;  // not empty: run these alone, for tests of huge launches
  Thread caller;
  Thread* current = nullptr;
  Fibers fibers;
  CallerStack caller_stack;
  char begin = 0, end = 0, fence = 0;  // orders: launch to threads, threads to launch, __threadfence
  Device device;
  std::set<void (*)()> launched;  // each instantiation of a kernel is one
};

inline State& state() {
  static State instance;
  return instance;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "fusedres emulator: %s\n", what);
  int shown = 0;
  for (const auto& block : state().resident)
    for (const Thread& thread : block->threads)
      if (!thread.done && thread.waits_for && shown++ < 4)
        std::fprintf(stderr, "  block (%u, %u) thread %u waits at %s\n", block->index.x, block->index.y, thread.index.x,
                     thread.waits_at);
  std::fflush(stderr);
  std::abort();
}

FUSEDRES_UNINSTRUMENTED inline void release_barrier_if_complete(Block& block) {
  if (block.alive > 0 && block.arrived == block.alive) {
    block.arrived = 0;
    ++block.generation;
  }
}

// Returns when another thread has changed the generation.
FUSEDRES_UNINSTRUMENTED inline void wait_for(const uint64_t& generation, uint64_t seen, const char* place) {
  State& s = state();
  Thread& me = *s.current;
  me.seen = seen;
  me.waits_for = &generation;
  me.waits_at = place;
  while (generation == seen) switch_fiber(me, s.caller, s.caller_stack, false);
  me.waits_for = nullptr;
}

FUSEDRES_UNINSTRUMENTED inline void barrier() {
  State& s = state();
  Thread& me = *s.current;
  Block& block = *me.block;
  ++me.barriers;
  char* order = &block.order[block.generation & 1];
  release(order);
  const uint64_t seen = block.generation;
  ++block.arrived;
  release_barrier_if_complete(block);
  wait_for(block.generation, seen, "__syncthreads");
  acquire(order);
}

// A shared array of the running block. Each declaration has one, of exactly its size, full of NaN at first.
inline void* shared_array(const void* declaration, size_t bytes, size_t alignment) {
  Quiet quiet;
  auto [found, is_new] = state().current->block->shared.try_emplace(declaration, nullptr, std::free);
  if (is_new) {
    void* memory = nullptr;
    if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), bytes) != 0) throw std::bad_alloc();
    found->second.reset(static_cast<unsigned char*>(memory));
    std::memset(memory, 0xff, bytes);
  }
  return found->second.get();
}

inline bool has_copies(const Thread& thread) {
  Quiet quiet;
  return !thread.copies.empty();
}

FUSEDRES_UNINSTRUMENTED inline void run_thread() {
  State& s = state();
  entered(s.caller_stack);
  acquire(&s.begin);
  s.kernel();
  Thread& me = *s.current;
  if (has_copies(me)) fail("a thread ended before its asynchronous copies did");
  release(&s.end);
  me.done = true;
  me.block->alive--;
  release_barrier_if_complete(*me.block);
  switch_fiber(me, s.caller, s.caller_stack, true);
}

inline void add_block(unsigned number) {
  State& s = state();
  auto block = std::make_unique<Block>();
  block->index = uint3{number % s.grid.x, number / s.grid.x % s.grid.y, number / (s.grid.x * s.grid.y)};
  block->threads.resize(s.block.x);
  block->warps.resize((s.block.x + 31) / 32);
  block->alive = int(s.block.x);
  for (unsigned i = 0; i < s.block.x; ++i) {
    Thread& thread = block->threads[i];
    thread.block = block.get();
    thread.index = uint3{i, 0, 0};
    static_cast<Fiber&>(thread) = s.fibers.take();
    prepare(thread, run_thread);
  }
  s.resident.push_back(std::move(block));
}

FUSEDRES_UNINSTRUMENTED inline void run_resident_blocks() {
  State& s = state();
  std::vector<Thread*> running;
  for (auto& block : s.resident)
    for (Thread& thread : block->threads) running.push_back(&thread);
  while (!running.empty()) {
    std::shuffle(running.begin(), running.end(), s.random);
    bool progress = false;
    for (Thread* thread : running) {
      if (thread->waits_for && *thread->waits_for == thread->seen) continue;
      progress = true;
      s.current = thread;
      switch_fiber(s.caller, *thread, s.caller_stack, false);
    }
    running.erase(std::remove_if(running.begin(), running.end(), [](Thread* t) { return t->done; }), running.end());
    if (!progress && !running.empty()) fail("deadlock: a barrier that not all its threads reach");
  }
}

inline void remove_blocks() {
  State& s = state();
  for (const auto& block : s.resident)
    for (const Thread& thread : block->threads)
      if (thread.barriers != block->threads[0].barriers)
        fail("threads of one block executed different numbers of __syncthreads");
  for (auto& block : s.resident)
    for (Thread& thread : block->threads) s.fibers.give_back(thread);
  s.resident.clear();
}

inline cudaError_t run_grid(dim3 grid, dim3 block, std::function<void()> kernel) {
  State& s = state();
  if (block.x == 0 || block.x > 1024 || block.y != 1 || block.z != 1 || grid.y > 65535)
    return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.x > 2147483647u) return cudaErrorInvalidConfiguration;
  s.grid = grid;
  s.block = block;
  s.kernel = std::move(kernel);
#if defined(__SANITIZE_THREAD__)
  s.caller.thread_sanitizer = __tsan_get_current_fiber();
#endif
  std::vector<unsigned> order = s.only_blocks;
  if (order.empty())
    for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i) order.push_back(i);
  std::shuffle(order.begin(), order.end(), s.random);
  constexpr size_t kResident = 4;  // in flight together, so that races between blocks show too
  for (size_t i = 0; i < order.size(); i += kResident) {
    for (size_t k = i; k < std::min(order.size(), i + kResident); ++k) add_block(order[k]);
    release(&s.begin);
    run_resident_blocks();
    acquire(&s.end);
    remove_blocks();
  }
  return cudaSuccess;
}

}  // namespace fusedres::emulator
