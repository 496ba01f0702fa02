// CUDA's names for a host compiler. The kernels of csrc/cuda include this file through csrc/cuda/platform.h, in place
// of CUDA's own headers. No wheel contains its code.
#pragma once

#include <math.h>

#include <cstring>

#include "scheduler.h"

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "declare shared memory with FUSEDRES_SHARED");

#define threadIdx (::fusedres::emulator::state().current->index)
#define blockIdx (::fusedres::emulator::state().current->block->index)
#define blockDim (::fusedres::emulator::state().block)
#define gridDim (::fusedres::emulator::state().grid)

#define FUSEDRES_SHARED(type, name, count)     \
  static const char declaration_of_##name = 0; \
  type* name = static_cast<type*>(             \
      ::fusedres::emulator::shared_array(&declaration_of_##name, sizeof(type) * (count), alignof(type)))

inline void __syncthreads() { fusedres::emulator::barrier(); }

inline void __threadfence() {
  fusedres::emulator::release(&fusedres::emulator::state().fence);
  fusedres::emulator::acquire(&fusedres::emulator::state().fence);
}

// Relaxed, as on the device: an atomic orders nothing but itself.
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned atomicExch(unsigned* address, unsigned value) {
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}

// Each rounds once: the host build runs with -ffp-contract=off.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

template <class T>
inline T __ldcg(const T* from) {
  return *from;
}
template <class T>
inline T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) fusedres::emulator::fail("misaligned vector access");
  return *from;
}

namespace fusedres::cuda {

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t, const Args&... args) {
  emulator::state().launched.insert(reinterpret_cast<void (*)()>(kernel));
  return emulator::run_grid(grid, block, [=] { kernel(args...); });
}

inline int thread_index() { return int(threadIdx.x); }

inline uint64_t l2_policy(bool keep) { return keep; }

inline void require_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) emulator::fail("misaligned vector access");
}

template <class Word>
inline Word load_word(const void* from) {
  require_alignment(from, sizeof(Word));
  Word word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

template <class Word>
inline void store_word(void* to, Word word) {
  require_alignment(to, sizeof word);
  std::memcpy(to, &word, sizeof word);
}

inline uint4 load_16_bytes(const void* from, uint64_t) { return load_word<uint4>(from); }
inline void store_16_bytes(void* to, uint4 word, uint64_t) { store_word(to, word); }
inline uint2 load_8_bytes(const void* from) { return load_word<uint2>(from); }
inline void store_8_bytes(void* to, uint2 word) { store_word(to, word); }

}  // namespace fusedres::cuda
