// Does wgmma read a no-swizzle K-major operand right when its start address is shifted by whole rows?
// A 3x3 convolution on a halo tile staged once needs it: every tap is one shift of the start address.
//   nvcc -gencode=arch=compute_90a,code=sm_90a wgmma_probe.cu -o wgmma_probe && ./wgmma_probe
// Prints one JSON line: for each shift the wrong elements of 64 x 8, with the descriptor's two strides as
// documented and exchanged. Integers small enough that every sum is exact.
#include <cuda_bf16.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

constexpr int M = 64, N = 8, K = 16;
constexpr int SHIFTS = 128, SLOTS = (M + SHIFTS) | 1;  // rows in shared memory, odd: free of bank conflicts
constexpr int ROW = 16;                                // bytes of a row's 8 values: [K/8][SLOTS][8]

#define CHECK(call)                                                                  \
  do {                                                                               \
    const cudaError_t error = (call);                                                \
    if (error != cudaSuccess) {                                                      \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error));            \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (0)

// start address, distance between k octets (leading) and between groups of 8 rows (stride), in 16-byte units
__device__ uint64_t descriptor(const void* start, unsigned leading, unsigned stride) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(start));
  return uint64_t(address >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32;
}

__global__ void probe(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, bool exchanged) {
  __shared__ alignas(128) __nv_bfloat16 sa[K / 8 * SLOTS * 8];  // [K/8][SLOTS][8]
  __shared__ alignas(128) __nv_bfloat16 sb[K / 8 * N * 8];      // [K/8][N][8]
  for (int i = threadIdx.x; i < K / 8 * SLOTS * 8; i += blockDim.x) sa[i] = a[i];
  for (int i = threadIdx.x; i < K / 8 * N * 8; i += blockDim.x) sb[i] = b[i];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const int shift = blockIdx.x;
  const unsigned octet = SLOTS * ROW, group = 8 * ROW;
  const uint64_t da = descriptor(sa + shift * 8, exchanged ? group : octet, exchanged ? octet : group);
  const uint64_t db = descriptor(sb, exchanged ? group : N * ROW, exchanged ? N * ROW : group);
  float r[4] = {0, 0, 0, 0};
  asm volatile(
      "wgmma.fence.sync.aligned;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, 0, 1, 1, 0, 0;\n"
      "wgmma.commit_group.sync.aligned;\n"
      "wgmma.wait_group.sync.aligned 0;\n"
      : "+f"(r[0]), "+f"(r[1]), "+f"(r[2]), "+f"(r[3])
      : "l"(da), "l"(db)
      : "memory");
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 4; i++) d[(shift * M + row + i / 2 * 8) * N + column + i % 2] = r[i];
}

int main() {
  static __nv_bfloat16 a[K / 8 * SLOTS * 8], b[K / 8 * N * 8];
  static float d[SHIFTS * M * N];
  for (auto& v : a) v = __nv_bfloat16(float(std::rand() % 17 - 8));
  for (auto& v : b) v = __nv_bfloat16(float(std::rand() % 17 - 8));
  __nv_bfloat16 *ga, *gb;
  float* gd;
  CHECK(cudaMalloc(&ga, sizeof a));
  CHECK(cudaMalloc(&gb, sizeof b));
  CHECK(cudaMalloc(&gd, sizeof d));
  CHECK(cudaMemcpy(ga, a, sizeof a, cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(gb, b, sizeof b, cudaMemcpyHostToDevice));
  for (int exchanged = 0; exchanged < 2; exchanged++) {
    CHECK(cudaMemset(gd, 0xff, sizeof d));  // NaN: an element nobody writes counts as wrong
    probe<<<SHIFTS, 128>>>(ga, gb, gd, exchanged);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpy(d, gd, sizeof d, cudaMemcpyDeviceToHost));
    std::printf("%s\"%s\": [", exchanged ? ", " : "{", exchanged ? "exchanged" : "documented");
    for (int shift = 0; shift < SHIFTS; shift++) {
      int wrong = 0;
      for (int row = 0; row < M; row++)
        for (int column = 0; column < N; column++) {
          float sum = 0;
          for (int k = 0; k < K; k++)
            sum += float(a[(k / 8 * SLOTS + row + shift) * 8 + k % 8]) * float(b[(k / 8 * N + column) * 8 + k % 8]);
          wrong += !(d[(shift * M + row) * N + column] == sum);
        }
      std::printf("%s%d", shift ? ", " : "", wrong);
    }
    std::printf("]");
  }
  std::printf("}\n");
}
