// The few CUDA facilities that the host build provides in its own way. nvcc gets plain CUDA, any other compiler gets
// the emulator, and the kernels are one source for both.
#pragma once

#include <cstdint>
#include <cstring>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#if defined(__CUDACC__)

#define FUSEDRES_SHARED(type, name, count) __shared__ type name[count]

namespace fusedres::cuda {

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, const Args&... args) {
  kernel<<<grid, block, 0, stream>>>(args...);
  return cudaGetLastError();
}

// threadIdx.x, read anew at every call: what is computed from it is not kept in registers through the loops before.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  __builtin_assume(index >= 0);  // divisions by powers of 2 are shifts
  return index;
}

// The L2 eviction policy is an operand of the load or store: one instruction serves both policies, chosen per access.
__device__ __forceinline__ uint64_t l2_policy(bool keep) {
  uint64_t first, normal;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal));
  return keep ? normal : first;
}

// For memory that no one writes during the kernel; not volatile, so that independent loads are batched.
__device__ __forceinline__ uint4 load_16_bytes(const void* from, uint64_t policy) {
  uint4 v;
  asm("ld.global.nc.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from), "l"(policy));
  return v;
}

__device__ __forceinline__ void store_16_bytes(void* to, uint4 v, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w), "l"(policy));
}

__device__ __forceinline__ uint2 load_8_bytes(const void* from) { return __ldg(static_cast<const uint2*>(from)); }

__device__ __forceinline__ void store_8_bytes(void* to, uint2 v) { *static_cast<uint2*>(to) = v; }

}  // namespace fusedres::cuda

#else
#include "../host_emulator/cuda_emulator.h"
#endif
