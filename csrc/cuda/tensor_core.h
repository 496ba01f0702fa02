// The instructions of a product: copies into shared memory that run beside it, loads of fragments, tensor cores, and
// what works on two values of 16 bits at once.
// They exist from compute capability 8.0 on.
//
// A fragment is the part of a 16x16 or 16x8 matrix that a lane of the warp holds. With g = lane / 4, t = lane % 4:
//   a [16, 16]   register 0: row g, columns 2t and 2t + 1; 1: row g + 8; 2: columns 8 more; 3: both
//   b [16, 8]    register 0: rows 2t and 2t + 1, column g; 1: rows 8 more
//   c [16, 8]    0, 1: row g, columns 2t and 2t + 1; 2, 3: row g + 8
#pragma once

#include <type_traits>

#include "platform.h"

#if defined(__CUDACC__)

namespace fusedres::cuda {

using SharedAddress = unsigned;

__device__ __forceinline__ SharedAddress shared_address(const void* shared) {
  return SharedAddress(__cvta_generic_to_shared(shared));
}

// Starts to copy `bytes`, 16 or fewer, and zeros after them. Both addresses are multiples of 16.
__device__ __forceinline__ void start_copy_of_16_bytes(SharedAddress shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void start_copy_of_16_bytes(void* shared, const void* global, int bytes) {
  start_copy_of_16_bytes(shared_address(shared), global, bytes);
}

// The copies of this thread since the last commit become a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread but the latest kLeft. Other threads see them after a barrier.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four 8x8 matrices of 16-bit values, one for each register: lane i gives the address of row i % 8 of matrix i / 8. A
// lane gets columns 2t and 2t + 1 of row g, of the transposed matrices if kTransposed.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], SharedAddress row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  }
}
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  load_matrices<kTransposed>(r, shared_address(row));
}

// c += a b
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// c = a b
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
  }
}

// relu of two values, each rounded, in one register, the first in its low half. NaN stays NaN.
template <class T>
__device__ __forceinline__ uint32_t round_pair_relu(float first, float second) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
}

// The differences of two pairs of values, each rounded. In bfloat16 it is one multiply-add, which rounds once.
template <class T>
__device__ __forceinline__ uint32_t subtract_pair(uint32_t left, uint32_t right) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, __half>) {
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(left), "r"(right));
  } else {
    constexpr uint32_t kMinusOnes = 0xbf80bf80u;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(right), "r"(kMinusOnes), "r"(left));
  }
  return pair;
}

// Four bits as two pairs of 16 bits, all of which are the bit. first: bits 0 and 1; second: 2 and 3
__device__ __forceinline__ void spread_bits(uint32_t& first, uint32_t& second, unsigned bits) {
  const unsigned signs = (bits & 0xfu) * 0x10204080u;             // bit i is the sign of byte i
  asm("prmt.b32 %0, %1, 0, 0x9988;" : "=r"(first) : "r"(signs));  // 8 + i: the sign of byte i, in a whole byte
  asm("prmt.b32 %0, %1, 0, 0xbbaa;" : "=r"(second) : "r"(signs));
}

}  // namespace fusedres::cuda

#else
#include "../host_emulator/tensor_core.h"
#endif
