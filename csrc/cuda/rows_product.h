// A tile of a product that sums over rows, [128, rows] times [rows, 128]. Both operands lie in memory as rows of
// channels, so that the inner dimension is outside.
#pragma once

#include "product_output.h"
#include "rows_plan.h"

namespace fusedres::cuda {

// acc += left right, for one step. Tensor cores cut off what does not fit as they add, which over thousands of rows
// would take away a part of a large mean: the products of a step are added up by themselves, and their sum is rounded.
template <class T>
__device__ __forceinline__ void multiply_rows(Accumulators& acc, const T* left, const T* right) {
  const int thread = thread_index(), lane = thread % 32;
  const int a_place = DepthOutside::left_place(Accumulators::first_row(thread), 0, lane);
  const int b_place = DepthOutside::right_place(Accumulators::first_column(thread), 0, lane);
  uint32_t b[2][2][4];  // [depth / 16][columns / 16]
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int j = 0; j < 2; ++j) load_matrices<true>(b[k][j], right + DepthOutside::moved(b_place, j, k));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t a[2][4];
#pragma unroll
    for (int k = 0; k < 2; ++k) load_matrices<true>(a[k], left + DepthOutside::moved(a_place, i, k));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float part[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int k = 0; k < 2; ++k) multiply_add<T>(part, a[k], b[k][j / 2][j % 2 * 2], b[k][j / 2][j % 2 * 2 + 1]);
#pragma unroll
      for (int e = 0; e < 4; ++e) acc.value[i][j][e] += part[e];
    }
  }
}

// One operand's matrix [P, channels], and the block's share of it.
template <class T>
struct RowsOperand {
  const T* first;  // of the split's first row
  int channels;
  int channel;  // the first of the tile
  bool packets;

  __device__ __forceinline__ int channel_of(const ChunkThread<DepthOutside>& me) const {
    return channel + me.column * kPacket;
  }
  // the step's chunk i of this thread, in elements from `first`
  __device__ __forceinline__ int64_t place(const ChunkThread<DepthOutside>& me, int step, int i) const {
    return int64_t(step * kProductDepth + me.row_of(i)) * channels + channel_of(me);
  }
  __device__ __forceinline__ void load(T* to, int step, int rows) const {
    const ChunkThread<DepthOutside> me(thread_index());
#pragma unroll
    for (int i = 0; i < kChunksOfThread; ++i) {
      const bool has_row = step * kProductDepth + me.row_of(i) < rows;
      load_chunk(to + me.place(i), first + place(me, step, i), has_row ? channels - channel_of(me) : 0, packets);
    }
  }
};

// Eight sums over a thread's rows, of its 8 channels.
struct ChunkSums {
  float value[kPacket];
};

// a - pivot in place of c, with a = relu(scale*c + shift), rounded; rows and channels that do not exist stay 0. pivot
// may be null: 0. The differences are added to `sums` before they are rounded, if there are any.
// kAtOnce: as many chunks as the registers of the kernel allow
template <int kAtOnce, class T>
__device__ __forceinline__ void center_chunks(T* tile, const RowsOperand<T>& operand, int step, int rows,
                                              const float* scale, const float* shift, const float* pivot,
                                              ChunkSums* sums) {
  const ChunkThread<DepthOutside> me(thread_index());
  const int channel = operand.channel_of(me);
  if (channel >= operand.channels) return;
  float s[kPacket], b[kPacket], p[kPacket];
  load_vector_chunk(s, scale, channel, operand.channels, operand.packets);
  load_vector_chunk(b, shift, channel, operand.channels, operand.packets);
#pragma unroll
  for (int e = 0; e < kPacket; ++e) p[e] = 0.f;
  if (pivot != nullptr) load_vector_chunk(p, pivot, channel, operand.channels, operand.packets);
#pragma unroll kAtOnce
  for (int i = 0; i < kChunksOfThread; ++i) {
    if (step * kProductDepth + me.row_of(i) >= rows) continue;
    Packet<T, kPacket> chunk = read_chunk(tile + me.place(i));
#pragma unroll
    for (int e = 0; e < kPacket; ++e) {
      const float difference = to_float(activate(chunk.value[e], s[e], b[e])) - p[e];
      if (sums != nullptr) sums->value[e] += difference;
      chunk.value[e] = round_to<T>(difference);
    }
    store_chunk(tile + me.place(i), chunk);
  }
}

// Leaves the tile and, if `with_sums`, the sums of its left channels in the workspace.
// staged: the ring's memory, of no other use
__device__ __forceinline__ void store_partial(const Accumulators& acc, const ChunkSums& sums, float* staged,
                                              float* workspace, const RowsPlan& plan, int left_tile, int right_tile,
                                              bool with_sums) {
  const int thread = thread_index(), first = left_tile * kProductSide;
  const int column = right_tile * kProductSide + packet_column(thread), valid = plan.right - column;
  float* products = workspace + plan.products_of(blockIdx.y) + int64_t(first) * plan.right + column;
  ColumnSums unused;
  for_each_packet<false>(acc, staged, plan.left - first, unused, [&](int row, float (&value)[kPacket]) {
    float* to = products + int64_t(row) * plan.right;
    if (valid >= kPacket && plan.right % 4 == 0) return write_packet(to, value);
#pragma unroll
    for (int e = 0; e < kPacket; ++e)
      if (e < valid) to[e] = value[e];
  });
  if (!with_sums) return;
  __syncthreads();
  write_packet(staged + packet_row(thread) * kProductSide + packet_column(thread), sums.value);
  __syncthreads();
  if (thread >= kProductSide || first + thread >= plan.left) return;
  float sum = 0.f;
  for (int row = 0; row < kPacketRows; ++row) sum += staged[row * kProductSide + thread];
  workspace[plan.sums_of(blockIdx.y) + first + thread] = sum;
}

// The sum of one value of each split, in their order.
__device__ __forceinline__ double sum_of_splits(const float* first, int64_t stride, int splits) {
  double sum = 0.;
  for (int split = 0; split < splits; ++split) sum += double(first[split * stride]);
  return sum;
}

}  // namespace fusedres::cuda
