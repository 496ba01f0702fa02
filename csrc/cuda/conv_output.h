// What follows the product of a convolution: BN, addition and ReLU, or the statistics; and the launch of either kernel
// that ends so.
#pragma once

#include "launch.h"
#include "product_output.h"

namespace fusedres::cuda {

struct ConvForwardPlan {
  ProductPlan product;  // its depth is that of one tap
  bool packets_in;      // rows of x and of the weight are whole chunks at multiples of 16 bytes, the vectors too
  bool packets_out;     // the same of y, the residual and their vectors
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

// Stores a tile, and takes what was stored into the moments of its columns.
// memory: kProductBytes of shared memory, which nobody reads any more
template <class T, bool kStatistics>
__device__ __forceinline__ void finish_tile(const ConvForward& args, const ConvForwardPlan& plan,
                                            const Accumulators& acc, int64_t tile, int first_column, float* memory,
                                            ColumnMoments& moments) {
  const ProductPlan& product = plan.product;
  float* vectors = memory + kStagedFloats;
  const int thread = thread_index(), own = packet_column(thread);
  prepare_output<T>(args, thread, first_column, vectors);
  ColumnSums sums;
  const int valid = product.columns - first_column - own;
  const int64_t place = product.first_row(tile) * product.columns + first_column + own;
  const int rows = product.rows_of_tile(tile);
  for_each_packet<kStatistics>(acc, memory, rows, sums, [&](int row, float (&value)[kPacket]) {
    if (valid <= 0) return;
    const int64_t here = place + int64_t(row) * product.columns;
    store_output<T>(args, vectors + own, here, valid, plan.packets_out, value);
  });
  if constexpr (kStatistics) {  // the earlier tiles of a block are whole
    const int64_t before = (tile - int64_t(blockIdx.y)) / product.groups * kProductSide;
    merge_tile(moments, sums, reinterpret_cast<ColumnSums*>(memory + kSumsPlace), before);
  }
}

// Stores mean and variance of the block's columns, in the last block that has them.
__device__ __forceinline__ void finish_columns(const ConvForward& args, const ProductPlan& product,
                                               ColumnMoments& moments, int first_column, void* memory,
                                               void* workspace) {
  if (args.mean == nullptr) return;
  __syncthreads();
  if (!merge_groups(moments, static_cast<int*>(memory), workspace, product)) return;
  const int column = first_column + int(threadIdx.x);
  if (int(threadIdx.x) < kProductSide && column < product.columns) {
    const float var = float(moments.m2 / double(product.rows));
    args.mean[column] =
        isnan(var) ? var : float(moments.mean);  // an infinity makes the mean NaN too, and so do no rows
    args.var[column] = var;
  }
}

// Launches one kernel of a convolution's forward: call(type, packets, prologue, statistics, args, plan, blocks), of
// which the flags are compile-time constants. Without packets one kernel does all, for few convolutions have none.
template <class Call>
cudaError_t launch_conv_forward(const ConvForward& args, Workspace& workspace, cudaStream_t stream, Call call) {
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
  const dim3 blocks(unsigned(plan.product.column_tiles), unsigned(plan.product.groups));
  const std::true_type yes;
  error = for_half_dtype(args.dtype, [&](auto type) {
    if (!plan.packets_in) return call(type, std::false_type(), yes, yes, without_mask, plan, blocks);
    return for_flag(args.in_scale != nullptr, [&](auto prologue) {
      return for_flag(args.mean != nullptr, [&](auto statistics) {
        return call(type, yes, prologue, statistics, without_mask, plan, blocks);
      });
    });
  });
  if (error != cudaSuccess || args.mask == nullptr || bytes_of_rows) return error;
  return pack_mask(args.dtype, numel, args.y, args.mask, stream);
}

}  // namespace fusedres::cuda
