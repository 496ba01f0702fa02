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
  const int kept = int(threadIdx.x), thread = thread_index();  // a's place is kept from step to step
  const SharedAddress a_row = address_of(left, DepthOutside::left_place(Accumulators::first_row(kept), 0, kept % 32));
  const SharedAddress b_row =
      address_of(right, DepthOutside::right_place(Accumulators::first_column(thread), 0, thread % 32));
#pragma unroll
  for (int side = 0; side < 2; ++side) {  // fragments of all columns at once would not fit the registers
    uint32_t b[2][4];                     // [depth / 16]
#pragma unroll
    for (int k = 0; k < 2; ++k) load_matrices<true>(b[k], DepthOutside::moved(b_row, side, k));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) load_matrices<true>(a[k], DepthOutside::moved(a_row, i, k));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float part[4];
        multiply<T>(part, a[0], b[0][2 * j], b[0][2 * j + 1]);
        multiply_add<T>(part, a[1], b[1][2 * j], b[1][2 * j + 1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) acc.value[i][2 * side + j][e] += part[e];
      }
    }
  }
}

// Sums over rows of the tile's left channels, by tensor cores too: the products with ones. Of 16 channels of its warp,
// a thread has two.
struct LeftSums {
  float value[2] = {0.f, 0.f};

  // of the tile, as thread / 32 % 4 has a quarter of the warp's 64
  __device__ static __forceinline__ int first_channel(int thread) {
    return Accumulators::first_row(thread) + thread / 32 % 4 * 16;
  }

  // adds one step's
  template <class T>
  __device__ __forceinline__ void add(const T* left) {
    constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
    const int thread = thread_index();
    const SharedAddress row = address_of(left, DepthOutside::left_place(first_channel(thread), 0, thread % 32));
    float part[4];  // its columns are equal
    uint32_t a[4];
    load_matrices<true>(a, row);
    multiply<T>(part, a, kOnes, kOnes);
    load_matrices<true>(a, DepthOutside::moved(row, 0, 1));
    multiply_add<T>(part, a, kOnes, kOnes);
    value[0] += part[0];
    value[1] += part[2];
  }

  // sums: of the tile's first channel; channels: how many the tile has
  __device__ __forceinline__ void store(float* sums, int channels) const {
    const int thread = thread_index(), lane = thread % 32;
    if (lane % 4 != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int channel = first_channel(thread) + lane / 4 + 8 * half;
      if (channel < channels) sums[channel] = value[half];
    }
  }
};

// As ChunkThread<DepthOutside>, whose place in shared memory is kept from step to step.
struct OwnChunks {
  int row, column, first_place;

  __device__ __forceinline__ explicit OwnChunks(int own_place) : first_place(own_place) {
    const int thread = thread_index();
    row = thread / DepthOutside::kChunks, column = thread % DepthOutside::kChunks;
  }
  __device__ __forceinline__ int row_of(int i) const { return row + i * ChunkThread<DepthOutside>::kRowStep; }
  __device__ __forceinline__ int place(int i) const { return first_place + i * ChunkThread<DepthOutside>::kPlaceStep; }
};

// One operand's matrix [P, channels], and the block's share of it.
// kPackets: rows are whole chunks at multiples of 16 bytes, as are the vectors
template <class T, bool kPackets>
struct RowsOperand {
  const T* first;  // of the split's first row
  int channels;
  int channel;  // the first of the tile

  __device__ __forceinline__ int channel_of(const OwnChunks& me) const { return channel + me.column * kPacket; }
  // the step's chunk i of this thread, in elements from `first`; within kMostElementsOfSplit
  __device__ __forceinline__ unsigned place(const OwnChunks& me, int step, int i) const {
    return unsigned(step * kProductDepth + me.row_of(i)) * unsigned(channels) + unsigned(channel_of(me));
  }
  __device__ __forceinline__ void load(const OwnChunks& me, T* to, int step, int rows) const {
#pragma unroll(kPackets ? kChunksOfThread : 1)
    for (int i = 0; i < kChunksOfThread; ++i) {
      const bool has_row = step * kProductDepth + me.row_of(i) < rows;
      load_chunk(to + me.place(i), first + place(me, step, i), has_row ? channels - channel_of(me) : 0, kPackets);
    }
  }

  // a - pivot in place of c, with a = relu(scale*c + shift), rounded; rows that do not exist stay 0. pivot may be null:
  // 0
  __device__ __forceinline__ void center(const OwnChunks& me, T* tile, int step, int rows, const float* scale,
                                         const float* shift, const T* pivot) const {
    const int own = channel_of(me) < channels ? channel_of(me) : 0;  // nobody uses the columns of others
    float s[kPacket], b[kPacket];
    read_vector_chunk<kPackets>(s, scale, own, channels);
    read_vector_chunk<kPackets>(b, shift, own, channels);
    uint4 p = make_uint4(0u, 0u, 0u, 0u);
    if (pivot != nullptr) p = load_word_part(pivot + own, channels - own, kPackets);
#pragma unroll(kPackets ? kChunksOfThread : 1)
    for (int i = 0; i < kChunksOfThread; ++i) {
      T* at = tile + me.place(i);
      const Packet<T, kPacket> a = activated(read_chunk(at), s, b);
      uint4 word;
      memcpy(&word, &a, sizeof word);
      word = make_uint4(subtract_pair<T>(word.x, p.x), subtract_pair<T>(word.y, p.y), subtract_pair<T>(word.z, p.z),
                        subtract_pair<T>(word.w, p.w));
      if (step * kProductDepth + me.row_of(i) < rows) *reinterpret_cast<uint4*>(at) = word;
    }
  }
};

// Leaves the tile from channels `first` and `first_column` on in the workspace. staged: the ring's memory, of no other
// use
__device__ __forceinline__ void store_partial(const Accumulators& acc, float* staged, float* workspace,
                                              const RowsPlan& plan, int first, int first_column) {
  const int thread = thread_index(), column = first_column + packet_column(thread), valid = plan.right - column;
  float* products = workspace + plan.products_of(blockIdx.y) + int64_t(first) * plan.right + column;
  ColumnSums unused;
  for_each_packet<false>(acc, staged, plan.left - first, unused, [&](int row, float (&value)[kPacket]) {
    float* to = products + int64_t(row) * plan.right;
    if (valid >= kPacket && plan.right % 4 == 0) return write_packet(to, value);
#pragma unroll
    for (int e = 0; e < kPacket; ++e)
      if (e < valid) to[e] = value[e];
  });
}

// The sum of one value of each split, in their order.
__device__ __forceinline__ double sum_of_splits(const float* first, int64_t stride, int splits) {
  double sum = 0.;
  for (int split = 0; split < splits; ++split) sum += double(first[split * stride]);
  return sum;
}

}  // namespace fusedres::cuda
