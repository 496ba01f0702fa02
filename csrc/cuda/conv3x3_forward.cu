// 3x3 convolutions. Without stride the input passes through a halo; with one it would be read by 2.25 taps and not by
// 9, and the halo of a tile would be four times as large, so that the product reads the input once for each tap.
#include "conv_forward.h"
#include "halo.h"

namespace fusedres::cuda {

// One thread's chunks of the weight's operands: two rows of [Cout][9][Cin].
template <class T, bool kPackets>
struct ForwardWeights {
  static constexpr int kUnrolled =
      kPackets ? kTapsOfLine : 1;  // single elements are loaded in loops, of which one will do
  const ProductPlan& plan;
  const T* at;
  int left;  // channels, of the row from the chunk on
  bool has_row[kChunksOfThread];

  __device__ __forceinline__ ForwardWeights(const ConvForward& args, const ProductPlan& plan, int first_column)
      : plan(plan) {
    const ChunkThread<DepthInside> me(thread_index());
    const int k = me.column * kPacket;
    left = plan.depth - k;
    at = static_cast<const T*>(args.weight) + int64_t(first_column + me.row) * kTaps * plan.depth + k;
#pragma unroll
    for (int i = 0; i < kChunksOfThread; ++i) has_row[i] = first_column + me.row_of(i) < plan.columns;
  }
  __device__ __forceinline__ void load(T* operand, int thread) const {
    const ChunkThread<DepthInside> me(thread);
#pragma unroll
    for (int i = 0; i < kChunksOfThread; ++i)
      load_chunk(operand + me.place(i), at + i * me.kRowStep * kTaps * int64_t(plan.depth), has_row[i] ? left : 0,
                 kPackets);
  }
  __device__ __forceinline__ void next_tap() { at += plan.depth; }
  __device__ __forceinline__ void next_step() {
    at += kProductDepth - (kTaps - 1) * int64_t(plan.depth), left -= kProductDepth;
  }
};

template <class T, bool kPackets, bool kPrologue, bool kStatistics>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks)
    conv3x3_forward_kernel(ConvForward args, ConvForwardPlan plan, HaloPlan halo_plan, void* workspace) {
  FUSEDRES_SHARED(OperandRow, memory, kProductRows);
  const ProductPlan& product = plan.product;
  const int first_column = product.first_column(int(blockIdx.x));
  ColumnMoments moments;
  for (int64_t tile = blockIdx.y; tile < product.row_tiles; tile += product.groups) {
    const int64_t first_row = product.first_row(tile);
    const TapsInside inside(halo_plan, first_row, product.rows_of_tile(tile));
    Accumulators acc;
    acc.clear();
    __syncthreads();  // the tile before this one was read from the memory of halo and ring
    run_halo_steps<DepthInside>(
        acc, reinterpret_cast<T*>(memory), halo_plan, inside, product.steps(),
        ForwardWeights<T, kPackets>(args, product, first_column),
        [&](int step, T* halo) {
          load_halo<kPackets>(halo, static_cast<const T*>(args.x), halo_plan, first_row, product.depth, step);
        },
        [&](int step, T* halo) {
          const int k = halo_channel(step), chunk = k / kPacket % DepthInside::kChunks;
          if (!kPrologue || args.in_scale == nullptr || k >= product.depth) return;
          float scale[kPacket], shift[kPacket];
          load_vector_chunk(scale, args.in_scale, k, product.depth, kPackets);
          load_vector_chunk(shift, args.in_shift, k, product.depth, kPackets);
          for_each_place(halo_plan.begin(first_row), halo_plan.end(first_row),
                         [&](int place) { activate_chunk(halo + DepthInside::place(place, chunk), scale, shift); });
        });
    finish_tile<T, kStatistics>(args, plan, acc, tile, first_column, reinterpret_cast<float*>(memory), moments);
  }
  if constexpr (kStatistics) finish_columns(args, product, moments, first_column, memory, workspace);
}

cudaError_t conv3x3_forward(const ConvForward& args, Workspace& workspace, cudaStream_t stream) {
  if (args.height.stride != 1 || args.width.stride != 1 || !halo_fits(args.width.in))
    return launch_implicit_product<3>(args, workspace, stream);
  return launch_conv_forward(args, workspace, stream,
                             [&](auto type, auto packets, auto prologue, auto statistics, const ConvForward& given,
                                 const ConvForwardPlan& plan, dim3 blocks) {
                               return launch(
                                   conv3x3_forward_kernel<typename decltype(type)::type, packets, prologue, statistics>,
                                   blocks, dim3(kProductThreads), stream, given, plan,
                                   plan_halo(args.height.in, args.width.in, args.rows), workspace.data);
                             });
}

}  // namespace fusedres::cuda
