// Raw weight gradient `Rc = dz^T (a - center)` of a 1x1 convolution and `dbias = sum dz`, in float32, both operands
// made in the prologue.
#include "launch.h"
#include "rows_product.h"
#include "sample.h"

namespace fusedres::cuda {

// Before the product: what to subtract from a, `pivot`, and what is left of center to subtract after it, `rest`.
// Far from 0 a - pivot is exact. Elsewhere it is rounded, and a pivot of 8 bits, a multiple of the spacing of a's
// values, leaves that to the bits of a: all bits of center would round every row the same way. In bfloat16 it would
// round a - pivot to 8 bits, where dz*a is exact in float32.
template <class T>
__global__ void __launch_bounds__(kSampleThreads)
    conv1x1_pivot_kernel(Conv1x1BackwardWeight args, T* pivot, float* rest) {
  const int i = int(blockIdx.x) * kSampleThreads + int(threadIdx.x);
  if (i >= args.in_channels) return;
  const float exact = args.center[i];
  const Sample found =
      sample(static_cast<const T*>(args.c), args.scale, args.shift, args.rows, int(args.in_channels), i);
  constexpr bool kCoarse = std::is_same_v<T, __nv_bfloat16>;
  const float near = kCoarse ? 0.f : to_float(round_to<__nv_bfloat16>(exact));
  const T coarse = round_to<T>(near), fine = round_to<T>(exact);
  const T value = found.far || !isfinite(to_float(coarse)) ? fine : coarse;  // near 65504, 8 bits round up to 65536
  pivot[i] = value;
  rest[i] = exact - to_float(value);
}

// pivot: null without center. workspace: as RowsPlan has it
template <class T, bool kPackets>
__global__ void __launch_bounds__(kProductThreads, kBlocksOf<kPackets>)
    conv1x1_backward_weight_kernel(Conv1x1BackwardWeight args, RowsPlan product, const T* pivot, float* workspace) {
  FUSEDRES_SHARED(OperandRow, memory, kProductRows);
  T* ring = reinterpret_cast<T*>(memory);
  const int64_t first_row = product.first_row(blockIdx.y);
  const int rows = int(product.rows_from(first_row));
  int right_tile;
  const int left_tile = product.left_tile(blockIdx.x, &right_tile);
  const RowsOperand<T, kPackets> dy{static_cast<const T*>(args.dy) + first_row * product.left, product.left,
                                    left_tile * kProductSide};
  const RowsOperand<T, kPackets> c{static_cast<const T*>(args.c) + first_row * product.right, product.right,
                                   right_tile * kProductSide};
  const int own_place = ChunkThread<DepthOutside>(int(threadIdx.x)).place(0);
  unsigned bits[kChunksOfThread] = {};  // of the step after the one that is multiplied
  const auto fetch = [&](int step) {
    if (args.mask == nullptr) return;
    const OwnChunks me(own_place);
    const int left = dy.channels - dy.channel_of(me), valid = left < kPacket ? left : kPacket;
#pragma unroll
    for (int i = 0; i < kChunksOfThread; ++i)
      if (valid > 0 && step * kProductDepth + me.row_of(i) < rows)
        bits[i] = chunk_bits<kPackets>(args.mask, first_row * product.left + int64_t(dy.place(me, step, i)), valid);
  };
  LeftSums sums;
  Accumulators acc;
  acc.clear();
  fetch(0);
  run_steps(
      ring, int(ceil_div(rows, kProductDepth)),
      [&](int step, T* left, T* right) {
        const OwnChunks me(own_place);
        dy.load(me, left, step, rows);
        c.load(me, right, step, rows);
      },
      [&](int step, T* left, T* right) {
        const OwnChunks me(own_place);
        if (args.mask != nullptr) {
#pragma unroll
          for (int i = 0; i < kChunksOfThread; ++i) select_chunk(left + me.place(i), bits[i]);
        }
        c.center(me, right, step, rows, args.scale, args.shift, pivot);
      },
      [&](int step, const T* left, const T* right) {
        fetch(step + 1);
        if (c.channel == 0) sums.add(left);
        multiply_rows(acc, left, right);
      });
  store_partial(acc, reinterpret_cast<float*>(memory), workspace, product, dy.channel, c.channel);
  if (c.channel == 0) sums.store(workspace + product.sums_of(blockIdx.y) + dy.channel, product.left - dy.channel);
}

// One thread for each element of Rc. Where dbias is not finite, the sums have its infinities by themselves.
__global__ void __launch_bounds__(kPacketThreads)
    merge_backward_weight_kernel(Conv1x1BackwardWeight args, RowsPlan plan, const float* rest, const float* workspace) {
  const int64_t element = int64_t(blockIdx.x) * kPacketThreads + int(threadIdx.x);
  if (element >= int64_t(plan.left) * plan.right) return;
  const int o = int(element / plan.right), i = int(element - int64_t(o) * plan.right);
  const double dbias = sum_of_splits(workspace + o, plan.left, plan.splits);
  double r = sum_of_splits(workspace + plan.products_of(0) + element, int64_t(plan.left) * plan.right, plan.splits);
  if (rest != nullptr && isfinite(dbias)) r -= dbias * double(rest[i]);
  args.r[element] = float(r);
  if (i == 0) args.dbias[o] = float(dbias);
}

namespace {
RowsPlan plan_of(const Conv1x1BackwardWeight& args, const DeviceLimits& limits) {
  return plan_rows(args.rows, args.out_channels, args.in_channels, false, limits);
}
// of rest and of pivot, [in_channels] each, in bytes, whole words of 16
int64_t rest_bytes(const Conv1x1BackwardWeight& args) {
  return args.center == nullptr ? 0 : ceil_div(args.in_channels, 4) * 16;
}
int64_t vectors_bytes(const Conv1x1BackwardWeight& args) {
  return args.center == nullptr ? 0 : rest_bytes(args) + ceil_div(args.in_channels, kPacket) * 16;
}
}  // namespace

size_t conv1x1_backward_weight_workspace(const Conv1x1BackwardWeight& args) {
  DeviceLimits limits;
  if (args.in_channels * args.out_channels == 0 || current_device_limits(&limits) != cudaSuccess) return 0;
  return size_t(vectors_bytes(args) + plan_of(args, limits).floats() * 4);
}

cudaError_t conv1x1_backward_weight(const Conv1x1BackwardWeight& args, Workspace& workspace, cudaStream_t stream) {
  if (args.in_channels * args.out_channels == 0) return cudaSuccess;
  DeviceLimits limits;
  cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  const RowsPlan plan = plan_of(args, limits);
  error = prepare_workspace(workspace, size_t(vectors_bytes(args) + plan.floats() * 4));
  if (error != cudaSuccess) return error;
  char* memory = static_cast<char*>(workspace.data);
  float* rest = args.center == nullptr ? nullptr : reinterpret_cast<float*>(memory);
  float* partials = reinterpret_cast<float*>(memory + vectors_bytes(args));
  const bool packets = args.out_channels % kPacket == 0 && args.in_channels % kPacket == 0 &&
                       aligned_to_16(args.dy, args.c, args.scale, args.shift);
  error = for_half_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* pivot = rest == nullptr ? nullptr : reinterpret_cast<T*>(memory + rest_bytes(args));
    if (pivot != nullptr) {
      const dim3 blocks(unsigned(ceil_div(args.in_channels, kSampleThreads)));
      const cudaError_t error =
          launch(conv1x1_pivot_kernel<T>, blocks, dim3(kSampleThreads), stream, args, pivot, rest);
      if (error != cudaSuccess) return error;
    }
    return for_flag(packets, [&](auto in_packets) {
      return launch(conv1x1_backward_weight_kernel<T, in_packets>, dim3(unsigned(plan.tiles), unsigned(plan.splits)),
                    dim3(kProductThreads), stream, args, plan, static_cast<const T*>(pivot), partials);
    });
  });
  if (error != cudaSuccess) return error;
  const int64_t blocks = ceil_div(args.in_channels * args.out_channels, kPacketThreads);
  return launch(merge_backward_weight_kernel, dim3(unsigned(blocks)), dim3(kPacketThreads), stream, args, plan,
                static_cast<const float*>(rest), static_cast<const float*>(partials));
}

}  // namespace fusedres::cuda
