// A 1x1 convolution as a product over the rows of x, with BN and ReLU before it and BN, addition and ReLU, or the
// statistics, after it. The inner dimension is that of x and of the weight in memory.
#include "bn_math.h"
#include "launch.h"
#include "product_output.h"

namespace fusedres::cuda {

struct Conv1x1ForwardPlan {
  ProductPlan product;
  bool packets_in;   // rows of x and of the weight are whole chunks at multiples of 16 bytes, the vectors too
  bool packets_out;  // the same of y, the residual and their vectors
};

// The row of x [N, H, W] for a row of y.
__device__ __forceinline__ int64_t row_of_x(const Conv1x1Forward& args, int64_t row) {
  if (args.height.stride <= 1 && args.width.stride <= 1) return row;
  const int64_t line = row / args.width.out, image = line / args.height.out;
  const int64_t x_line = image * args.height.in + (line - image * args.height.out) * args.height.stride;
  return x_line * args.width.in + (row - line * args.width.out) * args.width.stride;
}

// What is done to the product: scale*acc + shift + residual_scale*r, where shift has the bias and the residual's shift
// in it. vectors: [3][128] in shared memory, of the block's columns; thread i < 128 writes those of column i
template <class T>
__device__ __forceinline__ void prepare_output(const Conv1x1Forward& args, int i, int first_column, float* vectors) {
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
__device__ __forceinline__ void store_output(const Conv1x1Forward& args, const float* vectors, int64_t place, int valid,
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

template <class T, bool kPrologue, bool kStatistics>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks)
    conv1x1_forward_kernel(Conv1x1Forward args, Conv1x1ForwardPlan plan, void* workspace) {
  FUSEDRES_SHARED(uint4, memory, kProductWords);
  T* ring = reinterpret_cast<T*>(memory);
  float* staged = reinterpret_cast<float*>(memory);
  float* vectors = staged + kStagedFloats;
  const ProductPlan& product = plan.product;
  const int depth = product.depth, first_column = product.first_column(int(blockIdx.x));
  ColumnMoments moments;
  for (int64_t tile = blockIdx.y; tile < product.row_tiles; tile += product.groups) {
    const ChunkThread<DepthInside> me(thread_index());
    const T *x[kChunksOfThread], *weight[kChunksOfThread];
    bool has_row[kChunksOfThread], has_column[kChunksOfThread];
#pragma unroll
    for (int i = 0; i < kChunksOfThread; ++i) {
      const int64_t row = product.first_row(tile) + me.row_of(i);
      has_row[i] = row < product.rows;
      x[i] = static_cast<const T*>(args.x) + (has_row[i] ? row_of_x(args, row) : 0) * depth;
      const int column = first_column + me.row_of(i);
      has_column[i] = column < product.columns;
      weight[i] = static_cast<const T*>(args.weight) + int64_t(has_column[i] ? column : 0) * depth;
    }
    Accumulators acc;
    acc.clear();
    __syncthreads();  // the tile before this one was read from the ring's memory
    run_steps(
        ring, product.steps(),
        [&](int step, T* left, T* right) {
          const int k = step * kProductDepth + me.column * kPacket;
#pragma unroll
          for (int i = 0; i < kChunksOfThread; ++i) {
            load_chunk(left + me.place(i), x[i] + k, has_row[i] ? depth - k : 0, plan.packets_in);
            load_chunk(right + me.place(i), weight[i] + k, has_column[i] ? depth - k : 0, plan.packets_in);
          }
        },
        [&](int step, T* left, T*) {
          if constexpr (kPrologue) {
            const int k = step * kProductDepth + me.column * kPacket;
            if (k >= depth) return;  // the chunk is of zeros, and so is the weight's
            float scale[kPacket], shift[kPacket];
            load_vector_chunk(scale, args.in_scale, k, depth, plan.packets_in);
            load_vector_chunk(shift, args.in_shift, k, depth, plan.packets_in);
#pragma unroll
            for (int i = 0; i < kChunksOfThread; ++i) activate_chunk(left + me.place(i), scale, shift);
          }
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
    if constexpr (kStatistics) merge_tile(moments, sums, reinterpret_cast<ColumnSums*>(staged + kSumsPlace));
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

namespace {
ProductPlan plan_of(const Conv1x1Forward& args, const DeviceLimits& limits) {
  return plan_product(args.rows, args.out_channels, args.in_channels, limits);
}
}  // namespace

size_t conv1x1_forward_workspace(const Conv1x1Forward& args) {
  DeviceLimits limits;
  if (args.mean == nullptr || current_device_limits(&limits) != cudaSuccess) return 0;
  return plan_of(args, limits).workspace_bytes();
}

cudaError_t conv1x1_forward(const Conv1x1Forward& args, const Workspace& workspace, cudaStream_t stream) {
  const int64_t numel = args.rows * args.out_channels;
  if (args.out_channels == 0 || (numel == 0 && args.mean == nullptr)) return cudaSuccess;
  DeviceLimits limits;
  cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  Conv1x1ForwardPlan plan{};
  plan.product = plan_of(args, limits);
  plan.packets_in = args.in_channels % kPacket == 0 && aligned_to_16(args.x, args.weight, args.in_scale, args.in_shift);
  plan.packets_out = args.out_channels % kPacket == 0 && aligned_to_16(args.y, args.residual, args.scale, args.shift,
                                                                       args.residual_scale, args.residual_shift);
  if (args.mean != nullptr && plan.product.groups > 1) {
    error = prepare_workspace(workspace, plan.product.workspace_bytes(), plan.product.counter_bytes(), stream);
    if (error != cudaSuccess) return error;
  }
  const bool bytes_of_rows = args.out_channels % kPacket == 0;  // a row's bits end where a byte does
  Conv1x1Forward without_mask = args;
  if (!bytes_of_rows) without_mask.mask = nullptr;
  error = for_half_dtype(args.dtype, [&](auto type) {
    return for_flag(args.in_scale != nullptr, [&](auto prologue) {
      return for_flag(args.mean != nullptr, [&](auto statistics) {
        using T = typename decltype(type)::type;
        return launch(conv1x1_forward_kernel<T, prologue, statistics>,
                      dim3(unsigned(plan.product.column_tiles), unsigned(plan.product.groups)), dim3(kProductThreads),
                      stream, without_mask, plan, workspace.data);
      });
    });
  });
  if (error != cudaSuccess || args.mask == nullptr || bytes_of_rows) return error;
  return pack_mask(args.dtype, numel, args.y, args.mask, stream);
}

}  // namespace fusedres::cuda
