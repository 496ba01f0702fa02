// Raw weight gradient `Rc = dz^T (a - center)` of a 1x1 convolution and `dbias = sum dz`, in float32, both operands
// made in the prologue.
#include "launch.h"
#include "rows_product.h"
#include "sample.h"

namespace fusedres::cuda {

struct Conv1x1BackwardWeightPlan {
  RowsPlan product;
  bool packets_left;   // rows of dy are whole chunks at multiples of 16 bytes
  bool packets_right;  // the same of c and its vectors
};

// Before the product: what to subtract from a, `pivot`, and what is left of center to subtract after it, `rest`.
// Far from 0 a - pivot is exact. Elsewhere it is rounded, and a pivot of 8 bits, a multiple of the spacing of a's
// values, leaves that to the bits of a: all bits of center would round every row the same way. In bfloat16 it would
// round a - pivot to 8 bits, where dz*a is exact in float32.
template <class T>
__global__ void __launch_bounds__(kSampleThreads)
    conv1x1_pivot_kernel(Conv1x1BackwardWeight args, float* pivot, float* rest) {
  const int i = int(blockIdx.x) * kSampleThreads + int(threadIdx.x);
  if (i >= args.in_channels) return;
  const float exact = args.center[i];
  const Sample found =
      sample(static_cast<const T*>(args.c), args.scale, args.shift, args.rows, int(args.in_channels), i);
  constexpr bool kCoarse = std::is_same_v<T, __nv_bfloat16>;
  const float near = kCoarse ? 0.f : to_float(round_to<__nv_bfloat16>(exact));
  const float value = found.far ? to_float(round_to<T>(exact)) : near;
  pivot[i] = value;
  rest[i] = exact - value;
}

// pivot: null without center. workspace: as RowsPlan has it
template <class T>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks)
    conv1x1_backward_weight_kernel(Conv1x1BackwardWeight args, Conv1x1BackwardWeightPlan plan, const float* pivot,
                                   float* workspace) {
  FUSEDRES_SHARED(uint4, memory, kProductWords);
  T* ring = reinterpret_cast<T*>(memory);
  const RowsPlan& product = plan.product;
  const int64_t first_row = product.first_row(blockIdx.y);
  const int rows = int(product.rows_from(first_row));
  int right_tile;
  const int left_tile = product.left_tile(blockIdx.x, &right_tile);
  const RowsOperand<T> dy{static_cast<const T*>(args.dy) + first_row * product.left, product.left,
                          left_tile * kProductSide, plan.packets_left};
  const RowsOperand<T> c{static_cast<const T*>(args.c) + first_row * product.right, product.right,
                         right_tile * kProductSide, plan.packets_right};
  unsigned bits[kChunksOfThread];  // of the step after the one that is multiplied
  const auto fetch = [&](int step) {
    const ChunkThread<DepthOutside> me(thread_index());
    const int left = dy.channels - dy.channel_of(me), valid = left < kPacket ? left : kPacket;
#pragma unroll
    for (int i = 0; i < kChunksOfThread; ++i) {
      bits[i] = 0xffu;
      if (args.mask != nullptr && valid > 0 && step * kProductDepth + me.row_of(i) < rows)
        bits[i] = bits_at(args.mask, first_row * product.left + dy.place(me, step, i), valid);
    }
  };
  ChunkSums sums = {};
  Accumulators acc;
  acc.clear();
  fetch(0);
  run_steps(
      ring, int(ceil_div(rows, kProductDepth)),
      [&](int step, T* left, T* right) {
        dy.load(left, step, rows);
        c.load(right, step, rows);
      },
      [&](int step, T* left, T* right) {
        const ChunkThread<DepthOutside> me(thread_index());
#pragma unroll
        for (int i = 0; i < kChunksOfThread; ++i) {
          Packet<T, kPacket> dz = read_chunk(left + me.place(i));
#pragma unroll
          for (int e = 0; e < kPacket; ++e) {
            if (!(bits[i] >> e & 1u)) dz.value[e] = round_to<T>(0.f);
            sums.value[e] += to_float(dz.value[e]);
          }
          store_chunk(left + me.place(i), dz);
        }
        center_chunks<2>(right, c, step, rows, args.scale, args.shift, pivot, static_cast<ChunkSums*>(nullptr));
      },
      [&](int step, const T* left, const T* right) {
        fetch(step + 1);
        multiply_rows(acc, left, right);
      });
  store_partial(acc, sums, reinterpret_cast<float*>(memory), workspace, product, left_tile, right_tile,
                right_tile == 0);
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
// pivot and rest, each [in_channels], whole words of 16 bytes
int64_t pivot_floats(const Conv1x1BackwardWeight& args) {
  return args.center == nullptr ? 0 : ceil_div(args.in_channels, 4) * 4;
}
}  // namespace

size_t conv1x1_backward_weight_workspace(const Conv1x1BackwardWeight& args) {
  DeviceLimits limits;
  if (args.in_channels * args.out_channels == 0 || current_device_limits(&limits) != cudaSuccess) return 0;
  return size_t(2 * pivot_floats(args) + plan_of(args, limits).floats()) * 4;
}

cudaError_t conv1x1_backward_weight(const Conv1x1BackwardWeight& args, const Workspace& workspace,
                                    cudaStream_t stream) {
  if (args.in_channels * args.out_channels == 0) return cudaSuccess;
  DeviceLimits limits;
  cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  Conv1x1BackwardWeightPlan plan{};
  plan.product = plan_of(args, limits);
  const int64_t pivots = pivot_floats(args);
  if (workspace.bytes < size_t(2 * pivots + plan.product.floats()) * 4 || !aligned_to_16(workspace.data))
    return cudaErrorInvalidValue;
  float* pivot = pivots == 0 ? nullptr : static_cast<float*>(workspace.data);
  float* rest = pivots == 0 ? nullptr : pivot + pivots;
  float* partials = static_cast<float*>(workspace.data) + 2 * pivots;
  plan.packets_left = args.out_channels % kPacket == 0 && aligned_to_16(args.dy);
  plan.packets_right = args.in_channels % kPacket == 0 && aligned_to_16(args.c, args.scale, args.shift);
  error = for_half_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (pivot != nullptr) {
      const dim3 blocks(unsigned(ceil_div(args.in_channels, kSampleThreads)));
      const cudaError_t error =
          launch(conv1x1_pivot_kernel<T>, blocks, dim3(kSampleThreads), stream, args, pivot, rest);
      if (error != cudaSuccess) return error;
    }
    return launch(conv1x1_backward_weight_kernel<T>, dim3(unsigned(plan.product.tiles), unsigned(plan.product.splits)),
                  dim3(kProductThreads), stream, args, plan, static_cast<const float*>(pivot), partials);
  });
  if (error != cudaSuccess) return error;
  const int64_t blocks = ceil_div(args.in_channels * args.out_channels, kPacketThreads);
  return launch(merge_backward_weight_kernel, dim3(unsigned(blocks)), dim3(kPacketThreads), stream, args, plan.product,
                static_cast<const float*>(rest), static_cast<const float*>(partials));
}

}  // namespace fusedres::cuda
