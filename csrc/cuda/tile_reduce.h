// Reductions over rows: the merge inside a block, and the merge of all blocks by the last block. Every merge has a
// fixed order and there is no float atomic, so two runs are bitwise equal.
#pragma once

#include "walk.h"

namespace fusedres::cuda {

// How many partial results a thread of the last block loads before it merges them: each load waits for L2.
constexpr int kMergedAtOnce = 2;

// floats of shared memory: `Values` for each thread of a block's upper half, which is never smaller than its lanes
template <int Values>
constexpr int kMergeFloats = Values * kTileThreads / 2;

// Merges acc over the rows of a block's tile, in a fixed tree. The threads of row 0 get the result.
// merge(acc, b) takes b(0) ... b(N-1) into acc; zeros are its identity.
// shared: [values][upper half of the threads]
template <int N, class Merge>
__device__ __forceinline__ void merge_block(float (&acc)[N], float* shared, const TilePlan& plan, Merge merge) {
  const int thread = int(threadIdx.x), row = thread / plan.lanes;
  for (int rows = plan.tile_rows; rows > 1;) {
    const int half = (rows + 1) / 2, width = (rows - half) * plan.lanes;
    if (row >= half && row < rows) {
#pragma unroll
      for (int i = 0; i < N; ++i) shared[i * width + thread - half * plan.lanes] = acc[i];
    }
    __syncthreads();
    if (row < rows - half) {
      merge(acc, [&](int i) { return shared[i * width + thread]; });
    }
    __syncthreads();
    rows = half;
  }
}

// Leaves this block's acc (in the threads of row 0) in the workspace. True in the last block of its chunk,
// for which acc then holds the merge of all blocks, again in the threads of row 0. workspace: counters
// [chunks], then partials [chunks][groups][N][lanes]
template <int N, class Merge>
__device__ __forceinline__ bool merge_blocks(float (&acc)[N], float* shared, void* workspace, const TilePlan& plan,
                                             Merge merge) {
  const int lane = int(threadIdx.x) % plan.lanes, row = int(threadIdx.x) / plan.lanes;
  unsigned* counter = static_cast<unsigned*>(workspace) + blockIdx.x;
  float* partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.counter_bytes()) +
                    int64_t(blockIdx.x) * plan.groups * plan.partial_floats(N) + lane;
  if (row == 0) {
    float* mine = partials + int64_t(blockIdx.y) * plan.partial_floats(N);
#pragma unroll
    for (int i = 0; i < N; ++i) mine[i * plan.lanes] = acc[i];
  }
  __threadfence();
  FUSEDRES_SHARED(bool, last, 1);
  __syncthreads();
  if (threadIdx.x == 0) last[0] = atomicAdd(counter, 1u) == unsigned(plan.groups - 1);
  __syncthreads();
  if (!last[0]) return false;
  __threadfence();
  if (threadIdx.x == 0) atomicExch(counter, 0u);
#pragma unroll
  for (int i = 0; i < N; ++i) acc[i] = 0.f;
  for (int group = row; group < plan.groups; group += kMergedAtOnce * plan.tile_rows) {
    float theirs[kMergedAtOnce][N];  // zeros beyond the last group
#pragma unroll
    for (int k = 0; k < kMergedAtOnce; ++k) {
      const int from = group + k * plan.tile_rows;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        theirs[k][i] = 0.f;
        if (from < plan.groups) {
          theirs[k][i] = __ldcg(partials + int64_t(from) * plan.partial_floats(N) + i * plan.lanes);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kMergedAtOnce; ++k) merge(acc, [&](int i) { return theirs[k][i]; });
  }
  merge_block(acc, shared, plan, merge);
  return true;
}

// Merges acc over all rows of the tensor and calls finish(channel, values), in the last block only, once for
// each channel of its chunk. values(k) is value k of the channel: acc[k*V + i] for the i-th of V.
template <int V, int N, class Merge, class Finish>
__device__ __forceinline__ void reduce_tile(float (&acc)[N], float* shared, void* workspace, const TilePlan& plan,
                                            Merge merge, Finish finish) {
  merge_block(acc, shared, plan, merge);
  if (plan.groups > 1 && !merge_blocks(acc, shared, workspace, plan, merge)) return;
  const int thread = int(threadIdx.x);
  if (thread < plan.lanes) {
#pragma unroll
    for (int i = 0; i < N; ++i) shared[i * plan.lanes + thread] = acc[i];
  }
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * plan.lanes * V;
  for (int i = thread; i < plan.lanes * V && first + i < plan.channels; i += int(blockDim.x))
    finish(first + i, [&](int k) { return shared[(k * V + i % V) * plan.lanes + i / V]; });
}

// The merge of plain sums.
struct AddMerge {
  template <int N, class Other>
  __device__ __forceinline__ void operator()(float (&a)[N], Other b) const {
#pragma unroll
    for (int i = 0; i < N; ++i) a[i] += b(i);
  }
};

}  // namespace fusedres::cuda
