// Convolutions as products over the positions of y, with BN and ReLU before them and BN, addition and ReLU, or the
// statistics, after them. The inner dimension goes over the taps of the window, and for each over the channels of x,
// contiguous in memory in x and in the weight. What is not in the image is 0, whatever the prologue would make of it.
#pragma once

#include "launch.h"
#include "product_output.h"

namespace fusedres::cuda {

struct ConvForwardPlan {
  ProductPlan product;  // its depth is that of one tap
  bool packets_in;      // rows of x and of the weight are whole chunks at multiples of 16 bytes, the vectors too
  bool packets_out;     // the same of y, the residual and their vectors
};

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
template <class T, int kWindow>
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
      load_chunk(left + me.place(i), x[i] + tap_row * depth + k, has_position(i, tap) ? valid : 0, plan.packets_in);
      load_chunk(right + me.place(i), weight + i * me.kRowStep * row_of_weight() + tap * depth + k,
                 has_column[i] ? valid : 0, plan.packets_in);
    }
  }

  // relu(in_scale*x + in_shift) of what is in the image.
  __device__ __forceinline__ void activate(int step, T* left) const {
    const ChunkThread<DepthInside> me(thread_index());
    const int depth = plan.product.depth;
    int k;
    const int tap = tap_of(step, &k);
    if (k >= depth) return;  // the chunk is of zeros, and so is the weight's
    float scale[kPacket], shift[kPacket];
    load_vector_chunk(scale, args.in_scale, k, depth, plan.packets_in);
    load_vector_chunk(shift, args.in_shift, k, depth, plan.packets_in);
#pragma unroll
    for (int i = 0; i < kChunksOfThread; ++i)
      if (kWindow == 1 || has_position(i, tap)) activate_chunk(left + me.place(i), scale, shift);
  }
};

// What is done to the product: scale*acc + shift + residual_scale*r, where shift has the bias and the residual's shift
// in it. vectors: [3][128] in shared memory, of the block's columns; thread i < 128 writes those of column i
template <class T>
__device__ __forceinline__ void prepare_output(const ConvForward& args, int i, int first_column, float* vectors) {
  const int channel = first_column + i;
  if (i >= kProductSide || channel >= args.out_channels) return;
  float scale = 1.f, shift = 0.f, residual_scale = 1.f;
  if (args.scale != nullptr) scale = args.scale[channel], shift = args.shift[channel];
  if (args.bias != nullptr) shift = affine(to_float(static_cast<const T*>(args.bias)[channel]), scale, shift);
  if (args.residual_scale != nullptr)
    residual_scale = args.residual_scale[channel], shift += args.residual_shift[channel];
  vectors[i] = scale, vectors[kProductSide + i] = shift, vectors[2 * kProductSide + i] = residual_scale;
}

// Stores a row's 8 channels, `valid` of which exist, and leaves in `value` what was stored.
// vectors: those of prepare_output, from these channels on
template <class T>
__device__ __forceinline__ void store_output(const ConvForward& args, const float* vectors, int64_t place, int valid,
                                             bool packets, float (&value)[kPacket]) {
  const T* residual = static_cast<const T*>(args.residual);
  T* y = static_cast<T*>(args.y);
  float scale[kPacket], shift[kPacket];
  read_packet(scale, vectors);
  read_packet(shift, vectors + kProductSide);
#pragma unroll
  for (int i = 0; i < kPacket; ++i) value[i] = affine(value[i], scale[i], shift[i]);
  if (residual != nullptr) {
    const Packet<T, kPacket> r = load_part(residual + place, valid, packets);
    read_packet(scale, vectors + 2 * kProductSide);
#pragma unroll
    for (int i = 0; i < kPacket; ++i) value[i] = affine(to_float(r.value[i]), scale[i], value[i]);
  }
  Packet<T, kPacket> out;
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kPacket; ++i) {
    out.value[i] = round_to<T>(value[i]);
    const bool positive = passes(to_float(out.value[i]));
    bits |= unsigned(positive) << i;
    if (args.relu && !positive) out.value[i] = round_to<T>(0.f);
    value[i] = to_float(out.value[i]);
  }
  store_part(y + place, out, valid, packets);
  if (args.mask != nullptr) args.mask[place / kPacket] = uint8_t(bits);
}

template <class T, int kWindow, bool kPrologue, bool kStatistics>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks)
    conv_forward_kernel(ConvForward args, ConvForwardPlan plan, void* workspace) {
  FUSEDRES_SHARED(uint4, memory, kProductWords);
  T* ring = reinterpret_cast<T*>(memory);
  float* staged = reinterpret_cast<float*>(memory);
  float* vectors = staged + kStagedFloats;
  const ProductPlan& product = plan.product;
  const int first_column = product.first_column(int(blockIdx.x));
  ColumnMoments moments;
  for (int64_t tile = blockIdx.y; tile < product.row_tiles; tile += product.groups) {
    const ConvOperands<T, kWindow> operands(args, plan, product.first_row(tile), first_column);
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
    const int thread = thread_index(), own = packet_column(thread);
    prepare_output<T>(args, thread, first_column, vectors);
    ColumnSums sums;
    const int valid = product.columns - first_column - own;
    const int64_t place = product.first_row(tile) * product.columns + first_column + own;
    const int rows = product.rows_of_tile(tile);
    for_each_packet<kStatistics>(acc, staged, rows, sums, [&](int row, float (&value)[kPacket]) {
      if (valid <= 0) return;
      const int64_t here = place + int64_t(row) * product.columns;
      store_output<T>(args, vectors + own, here, valid, plan.packets_out, value);
    });
    if constexpr (kStatistics) {  // the earlier tiles of a block are whole
      const int64_t before = (tile - int64_t(blockIdx.y)) / product.groups * kProductSide;
      merge_tile(moments, sums, reinterpret_cast<ColumnSums*>(staged + kSumsPlace), before);
    }
  }
  if constexpr (!kStatistics) return;
  __syncthreads();
  if (!merge_groups(moments, reinterpret_cast<int*>(memory), workspace, product)) return;
  const int column = first_column + int(threadIdx.x);
  if (int(threadIdx.x) < kProductSide && column < product.columns) {
    const float var = float(moments.m2 / double(product.rows));
    args.mean[column] =
        isnan(var) ? var : float(moments.mean);  // an infinity makes the mean NaN too, and so do no rows
    args.var[column] = var;
  }
}

template <int kWindow>
cudaError_t launch_conv_forward(const ConvForward& args, const Workspace& workspace, cudaStream_t stream) {
  const int64_t numel = args.rows * args.out_channels;
  if (args.out_channels == 0 || (numel == 0 && args.mean == nullptr)) return cudaSuccess;
  DeviceLimits limits;
  cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  ConvForwardPlan plan{};
  plan.product = plan_product(args.rows, args.out_channels, args.in_channels, limits);
  plan.packets_in = args.in_channels % kPacket == 0 && aligned_to_16(args.x, args.weight, args.in_scale, args.in_shift);
  plan.packets_out = args.out_channels % kPacket == 0 && aligned_to_16(args.y, args.residual, args.scale, args.shift,
                                                                       args.residual_scale, args.residual_shift);
  if (args.mean != nullptr && plan.product.groups > 1) {
    error = prepare_workspace(workspace, plan.product.workspace_bytes(), plan.product.counter_bytes(), stream);
    if (error != cudaSuccess) return error;
  }
  const bool bytes_of_rows = args.out_channels % kPacket == 0;  // a row's bits end where a byte does
  ConvForward without_mask = args;
  if (!bytes_of_rows) without_mask.mask = nullptr;
  error = for_half_dtype(args.dtype, [&](auto type) {
    return for_flag(args.in_scale != nullptr, [&](auto prologue) {
      return for_flag(args.mean != nullptr, [&](auto statistics) {
        using T = typename decltype(type)::type;
        return launch(conv_forward_kernel<T, kWindow, prologue, statistics>,
                      dim3(unsigned(plan.product.column_tiles), unsigned(plan.product.groups)), dim3(kProductThreads),
                      stream, without_mask, plan, workspace.data);
      });
    });
  });
  if (error != cudaSuccess || args.mask == nullptr || bytes_of_rows) return error;
  return pack_mask(args.dtype, numel, args.y, args.mask, stream);
}

}  // namespace fusedres::cuda
