// From accumulators to memory: a tile passes through shared memory as float32, so that a thread has 8 neighbouring
// columns of a row, one packet; and the statistics of what was stored.
#pragma once

#include "product.h"

namespace fusedres::cuda {

constexpr int kPacketsOfRow = kProductSide / kPacket;         // 16
constexpr int kPacketRows = kProductThreads / kPacketsOfRow;  // 16 rows side by side
constexpr int kStagedRows = kProductSide / 2;                 // half of the tile at once
constexpr int kStagedStride = kProductSide + 8;               // the 8 keep stores of a warp in different banks
constexpr int kColumnParts = kProductThreads / kProductSide;  // threads that add up one column
constexpr int kStagedFloats = kStagedRows * kStagedStride;
constexpr int kOutputVectors = 3;  // [128] floats each, behind the staged rows; the sums of a tile are behind these
constexpr int kSumsPlace = kStagedFloats + kOutputVectors * kProductSide;

// This thread's packet in every row it has.
__device__ __forceinline__ int packet_column(int thread) { return thread % kPacketsOfRow * kPacket; }
__device__ __forceinline__ int packet_row(int thread) { return thread / kPacketsOfRow; }

__device__ __forceinline__ void store_pair(float* to, const float* pair) {
  *reinterpret_cast<float2*>(to) = make_float2(pair[0], pair[1]);
}
__device__ __forceinline__ void read_packet(float (&value)[kPacket], const float* from) {
#pragma unroll
  for (int i = 0; i < kPacket; i += 4) {
    const float4 word = *reinterpret_cast<const float4*>(from + i);
    value[i] = word.x, value[i + 1] = word.y, value[i + 2] = word.z, value[i + 3] = word.w;
  }
}
__device__ __forceinline__ void write_packet(float* to, const float (&value)[kPacket]) {
#pragma unroll
  for (int i = 0; i < kPacket; i += 4)
    *reinterpret_cast<float4*>(to + i) = make_float4(value[i], value[i + 1], value[i + 2], value[i + 3]);
}

// Shifted sums over a thread's share of one column of a tile, by the first of its values.
struct ColumnSums {
  float shift = 0.f, sum = 0.f, square = 0.f;
  int count = 0;

  __device__ __forceinline__ void add(float value) {
    if (count++ == 0) shift = value;
    const float x = value - shift;
    sum += x;
    square = fmaf(x, x, square);
  }
};

// The tile's row that stands in a row of shared memory: half of each warp's rows are there at once, so that the
// registers of the first half are free when the second is there.
__device__ __forceinline__ int staged_tile_row(int staged_row, int half) {
  constexpr int kWarpHalf = Accumulators::kWarpRows / 2;
  return staged_row / kWarpHalf * Accumulators::kWarpRows + half * kWarpHalf + staged_row % kWarpHalf;
}

// Stores half of the tile into shared memory. staged: [64][136]
__device__ __forceinline__ void stage_half(const Accumulators& acc, float* staged, int half) {
  const int thread = thread_index(), lane = thread % 32, group = lane / 4, pair = lane % 4 * 2;
  float* to = staged + (Accumulators::first_row(thread) / 2 + group) * kStagedStride +
              Accumulators::first_column(thread) + pair;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int below = 0; below < 2; ++below)
        store_pair(to + (16 * i + 8 * below) * kStagedStride + 8 * j, &acc.value[2 * half + i][j][2 * below]);
}

// use(row, value) with value [8] for each row of the tile that this thread has; what it leaves there is added to `sums`
// if kSums. staged: [64][136] of shared memory
template <bool kSums, class Use>
__device__ __forceinline__ void for_each_packet(const Accumulators& acc, float* staged, int rows, ColumnSums& sums,
                                                Use use) {
  const int thread = thread_index();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half > 0) __syncthreads();
    stage_half(acc, staged, half);
    __syncthreads();
#pragma unroll 1
    for (int staged_row = packet_row(thread); staged_row < kStagedRows; staged_row += kPacketRows) {
      const int row = staged_tile_row(staged_row, half);
      if (row >= rows) break;
      float* at = staged + staged_row * kStagedStride + packet_column(thread);
      float value[kPacket];
      read_packet(value, at);
      use(row, value);
      if constexpr (kSums) write_packet(at, value);
    }
    if constexpr (kSums) {
      __syncthreads();
      const float* column = staged + thread % kProductSide;
#pragma unroll 2
      for (int staged_row = thread / kProductSide; staged_row < kStagedRows; staged_row += kColumnParts)
        if (staged_tile_row(staged_row, half) < rows) sums.add(column[staged_row * kStagedStride]);
    }
  }
}

static_assert(kSumsPlace * 4 + kProductThreads * int(sizeof(ColumnSums)) <= kProductBytes);

// Mean and M2 of one column, over the tiles that a block has had: of many small parts, so in float64.
struct ColumnMoments {
  double mean = 0., m2 = 0.;

  // before: how many values these moments are of; count: of the other's
  __device__ __forceinline__ void merge(double other_mean, double other_m2, int64_t before, int64_t count) {
    const double delta = other_mean - mean, weight = double(count) / double(before + count);
    m2 += other_m2 + delta * delta * double(before) * weight;
    mean += delta * weight;
  }
};

// Takes the sums of a tile into the moments of its columns, which thread i < 128 has of column i.
// shared: [256] sums, of no other use; before: the rows of the block's earlier tiles
__device__ __forceinline__ void merge_tile(ColumnMoments& moments, const ColumnSums& sums, ColumnSums* shared,
                                           int64_t before) {
  const int thread = thread_index();
  shared[thread] = sums;
  __syncthreads();
  if (thread >= kProductSide) return;
#pragma unroll 1
  for (int part = 0; part < kColumnParts; ++part) {
    const ColumnSums& s = shared[part * kProductSide + thread];
    if (s.count == 0) continue;
    const float mean = s.sum / float(s.count), m2 = s.square - s.sum * mean;
    moments.merge(double(s.shift) + double(mean), m2 < 0.f ? 0. : double(m2), before, s.count);
    before += s.count;
  }
}

// Partial results behind the counters of the workspace, this thread's first: [column_tiles][groups][2][128], those of a
// block from plan.partial_of on.
__device__ __forceinline__ double* partial_results(void* workspace, const ProductPlan& plan) {
  return reinterpret_cast<double*>(static_cast<char*>(workspace) + plan.counter_bytes()) + int(threadIdx.x);
}

// True in the last block of these columns, which then sees what the others have left in the workspace before.
// flag: in shared memory
__device__ __forceinline__ bool is_last_group(int* flag, void* workspace, const ProductPlan& plan) {
  unsigned* counter = static_cast<unsigned*>(workspace) + blockIdx.x;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(counter, 1u) == unsigned(plan.groups - 1);
  __syncthreads();
  if (*flag == 0) return false;
  __threadfence();
  if (threadIdx.x == 0) atomicExch(counter, 0u);
  return true;
}

// The moments of all blocks of these columns, in the order of the groups. True in the last block, which has them.
// flag: in shared memory; workspace: counters [column_tiles], then partial results
__device__ __forceinline__ bool merge_groups(ColumnMoments& moments, int* flag, void* workspace,
                                             const ProductPlan& plan) {
  if (plan.groups == 1) return true;
  double* partials = partial_results(workspace, plan);
  if (int(threadIdx.x) < kProductSide) {
    double* mine = partials + plan.partial_of(blockIdx.x, blockIdx.y);
    mine[0] = moments.mean;
    mine[kProductSide] = moments.m2;
  }
  if (!is_last_group(flag, workspace, plan)) return false;
  if (int(threadIdx.x) < kProductSide) {
    moments = ColumnMoments();
    int64_t before = 0;
    for (int group = 0; group < plan.groups; ++group) {
      const double* theirs = partials + plan.partial_of(blockIdx.x, group);
      moments.merge(__ldcg(theirs), __ldcg(theirs + kProductSide), before, plan.rows_of_group(group));
      before += plan.rows_of_group(group);
    }
  }
  return true;
}

}  // namespace fusedres::cuda
