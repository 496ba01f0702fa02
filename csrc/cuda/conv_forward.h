// Convolutions as products over the positions of y, with BN and ReLU before them and BN, addition and ReLU, or the
// statistics, after them. The inner dimension goes over the taps of the window, and for each over the channels of x,
// contiguous in memory in x and in the weight. What is not in the image is 0, whatever the prologue would make of it.
#pragma once

#include "conv_output.h"

namespace fusedres::cuda {

// A position of y: its place in x, of a window the first tap's, which may lie outside.
struct Position {
  int64_t row;  // of x [N*H*W]
  int h, w;     // not set of a 1x1 window
};

template <int kWindow>
__device__ __forceinline__ Position position_of(const ConvForward& args, int64_t row) {
  if (kWindow == 1 && args.height.stride <= 1 && args.width.stride <= 1) return {row, 0, 0};
  const int64_t line = row / args.width.out, image = line / args.height.out;
  const int64_t h = (line - image * args.height.out) * args.height.stride - kWindow / 2;
  const int64_t w = (row - line * args.width.out) * args.width.stride - kWindow / 2;
  return {(image * args.height.in + h) * args.width.in + w, int(h), int(w)};
}

// One thread's part of the operands of a tile: two rows of x and two of the weight.
template <class T, int kWindow, bool kPackets>
struct ConvOperands {
  const ConvForward& args;
  const ConvForwardPlan& plan;
  const T *x[kChunksOfThread], *weight;        // the second row of the weight lies kRowStep rows behind the first
  int h[kChunksOfThread], w[kChunksOfThread];  // of a window
  bool has_row[kChunksOfThread], has_column[kChunksOfThread];

  __device__ __forceinline__ ConvOperands(const ConvForward& args, const ConvForwardPlan& plan, int64_t first_row,
                                          int first_column)
      : args(args), plan(plan) {
    const ChunkThread<DepthInside> me(thread_index());
    const ProductPlan& product = plan.product;
    weight = static_cast<const T*>(args.weight) + (first_column + me.row) * row_of_weight();
#pragma unroll
    for (int i = 0; i < kChunksOfThread; ++i) {
      const int64_t row = first_row + me.row_of(i);
      has_row[i] = row < product.rows;
      const Position position = position_of<kWindow>(args, has_row[i] ? row : 0);
      x[i] = static_cast<const T*>(args.x) + position.row * product.depth;
      h[i] = position.h, w[i] = position.w;
      has_column[i] = first_column + me.row_of(i) < product.columns;
    }
  }

  __device__ __forceinline__ int64_t row_of_weight() const { return int64_t(kWindow * kWindow) * plan.product.depth; }

  __device__ __forceinline__ bool has_position(int i, int tap) const {
    if constexpr (kWindow == 1) return has_row[i];
    const int at_h = h[i] + tap / kWindow, at_w = w[i] + tap % kWindow;
    return has_row[i] && unsigned(at_h) < unsigned(args.height.in) && unsigned(at_w) < unsigned(args.width.in);
  }

  // Of a step its tap, and the first channel of this thread's chunks.
  __device__ __forceinline__ int tap_of(int step, int* k) const {
    const int column = thread_index() % DepthInside::kChunks * kPacket;
    const int tap = kWindow == 1 ? 0 : step / plan.product.steps();
    *k = (step - tap * plan.product.steps()) * kProductDepth + column;
    return tap;
  }

  __device__ __forceinline__ void load(int step, T* left, T* right) const {
    const ChunkThread<DepthInside> me(thread_index());
    const int depth = plan.product.depth;
    int k;
    const int tap = tap_of(step, &k);
    const int64_t tap_row = kWindow == 1 ? 0 : tap / kWindow * args.width.in + tap % kWindow;
#pragma unroll
    for (int i = 0; i < kChunksOfThread; ++i) {
      const int valid = depth - k;
      load_chunk(left + me.place(i), x[i] + tap_row * depth + k, has_position(i, tap) ? valid : 0, kPackets);
      load_chunk(right + me.place(i), weight + i * me.kRowStep * row_of_weight() + tap * depth + k,
                 has_column[i] ? valid : 0, kPackets);
    }
  }

  // relu(in_scale*x + in_shift) of what is in the image.
  __device__ __forceinline__ void activate(int step, T* left) const {
    if (args.in_scale == nullptr) return;
    const ChunkThread<DepthInside> me(thread_index());
    const int depth = plan.product.depth;
    int k;
    const int tap = tap_of(step, &k);
    if (k >= depth) return;  // the chunk is of zeros, and so is the weight's
    float scale[kPacket], shift[kPacket];
    load_vector_chunk(scale, args.in_scale, k, depth, kPackets);
    load_vector_chunk(shift, args.in_shift, k, depth, kPackets);
#pragma unroll
    for (int i = 0; i < kChunksOfThread; ++i)
      if (kWindow == 1 || has_position(i, tap)) activate_chunk(left + me.place(i), scale, shift);
  }
};

template <class T, int kWindow, bool kPackets, bool kPrologue, bool kStatistics>
__global__ void __launch_bounds__(kProductThreads, kBlocksOf<kPackets || kWindow == 1>)
    conv_forward_kernel(ConvForward args, ConvForwardPlan plan, void* workspace) {
  FUSEDRES_SHARED(OperandRow, memory, kProductRows);
  T* ring = reinterpret_cast<T*>(memory);
  const ProductPlan& product = plan.product;
  const int first_column = product.first_column(int(blockIdx.x));
  ColumnMoments moments;
  for (int64_t tile = blockIdx.y; tile < product.row_tiles; tile += product.groups) {
    const ConvOperands<T, kWindow, kPackets> operands(args, plan, product.first_row(tile), first_column);
    Accumulators acc;
    acc.clear();
    __syncthreads();  // the tile before this one was read from the ring's memory
    run_steps(
        ring, kWindow * kWindow * product.steps(),
        [&](int step, T* left, T* right) { operands.load(step, left, right); },
        [&](int step, T* left, T*) {
          if constexpr (kPrologue) operands.activate(step, left);
        },
        [&](int, const T* left, const T* right) { multiply_step<DepthInside, DepthInside>(acc, left, right); });
    finish_tile<T, kStatistics>(args, plan, acc, tile, first_column, reinterpret_cast<float*>(memory), moments);
  }
  if constexpr (kStatistics) finish_columns(args, product, moments, first_column, memory, workspace);
}

template <int kWindow>
cudaError_t launch_implicit_product(const ConvForward& args, Workspace& workspace, cudaStream_t stream) {
  return launch_conv_forward(
      args, workspace, stream,
      [&](auto type, auto packets, auto prologue, auto statistics, const ConvForward& given,
          const ConvForwardPlan& plan, dim3 blocks) {
        return launch(conv_forward_kernel<typename decltype(type)::type, kWindow, packets, prologue, statistics>,
                      blocks, dim3(kProductThreads), stream, given, plan, workspace.data);
      });
}

}  // namespace fusedres::cuda
