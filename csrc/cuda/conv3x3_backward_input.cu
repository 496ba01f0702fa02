// The input gradient of a 3x3 convolution without stride: the convolution of dc with the weight's taps in reverse order
// and its channels swapped. BN's backward makes dc once for all taps, in the halo, and the tile's own rows of it are
// the side output.
#include "conv_backward.h"
#include "halo.h"
#include "launch.h"

namespace fusedres::cuda {

struct Conv3x3BackwardInputPlan {
  ProductPlan product;
  HaloPlan halo;
  bool packets_in;   // rows of dy, c, dc and the weight are whole chunks at multiples of 16 bytes, and the vectors too
  bool packets_out;  // the same of dx and shortcut_dy
};

// One thread's chunks of the weight's operands: two rows of a tap of [Cout][9][Cin], from the last tap to the first.
template <class T, bool kPackets>
struct ReversedWeights {
  static constexpr int kUnrolled =
      kPackets ? kTapsOfLine : 1;  // single elements are loaded in loops, of which one will do
  const ProductPlan& plan;
  const T* at;
  int left_columns, left_rows;

  __device__ __forceinline__ ReversedWeights(const Conv3x3BnBackwardInput& args, const ProductPlan& plan,
                                             int first_column)
      : plan(plan) {
    const ChunkThread<DepthOutside> me(thread_index());
    const int column = first_column + me.column * kPacket;
    left_columns = plan.columns - column, left_rows = plan.depth - me.row;
    if (left_columns <= 0) left_rows = 0;
    at = static_cast<const T*>(args.weight) + (int64_t(me.row) * kTaps + kTaps - 1) * plan.columns + column;
  }
  __device__ __forceinline__ void load(T* operand, int thread) const {
    const ChunkThread<DepthOutside> me(thread);
#pragma unroll
    for (int i = 0; i < kChunksOfThread; ++i)
      load_chunk(operand + me.place(i), at + i * me.kRowStep * kTaps * int64_t(plan.columns),
                 i * me.kRowStep >= left_rows ? 0
                 : kPackets                   ? kPacket
                                              : left_columns,
                 kPackets);
  }
  __device__ __forceinline__ void next_tap() { at -= plan.columns; }
  __device__ __forceinline__ void next_step() {
    at += (kTaps * kProductDepth + kTaps - 1) * int64_t(plan.columns), left_rows -= kProductDepth;
  }
};

// Makes dc of this thread's chunks of dy in the halo, and stores that of rows of the tile in the first of the blocks
// that make it. halo: the first of its places; k: the first of the chunks' channels
template <class T, bool kPackets>
__device__ __forceinline__ void differentiate_halo(const Conv3x3BnBackwardInput& args,
                                                   const Conv3x3BackwardInputPlan& plan, int64_t first_row, int k,
                                                   T* halo) {
  const int depth = plan.product.depth, chunk = k / kPacket % DepthInside::kChunks;
  const int64_t first = plan.halo.first_row(first_row) * depth + k;
  const bool training = args.grads.B != nullptr;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const int channel = k + half * kHalf, valid = depth - channel;
    if (!kPackets && valid <= 0) return;
    const ChannelVectors vectors(args, channel, kPackets, training, Relu::kAny);
    for_each_place(plan.halo.begin(first_row), plan.halo.end(first_row), [&](int place) {
      uint2* at = reinterpret_cast<uint2*>(halo + DepthInside::place(place, chunk)) + half;
      const int64_t here = first + place * int64_t(depth) + half * kHalf;
      const uint2 dc = differentiated<T>(*at, load_half<T>(static_cast<const T*>(args.c) + here, valid, kPackets),
                                         vectors, training);
      *at = dc;
      const bool of_tile = unsigned(place - plan.halo.width - 1) < unsigned(kProductSide);
      if (blockIdx.x == 0 && of_tile) store_half(static_cast<T*>(args.dc) + here, dc, valid, kPackets);
    });
  }
}

template <class T, bool kPackets, bool kPrologue>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks)
    conv3x3_backward_input_kernel(Conv3x3BnBackwardInput args, Conv3x3BackwardInputPlan plan) {
  FUSEDRES_SHARED(OperandRow, memory, kProductRows);
  const ProductPlan& product = plan.product;
  const int first_column = product.first_column(int(blockIdx.x));
  for (int64_t tile = blockIdx.y; tile < product.row_tiles; tile += product.groups) {
    const int64_t first_row = product.first_row(tile);
    const TapsInside inside(plan.halo, first_row, product.rows_of_tile(tile));
    Accumulators acc;
    acc.clear();
    __syncthreads();  // the tile before this one was read from the memory of halo and ring
    run_halo_steps<DepthOutside>(
        acc, reinterpret_cast<T*>(memory), plan.halo, inside, product.steps(),
        ReversedWeights<T, kPackets>(args, product, first_column),
        [&](int step, T* halo) {
          load_halo<kPackets>(halo, static_cast<const T*>(args.dy), plan.halo, first_row, product.depth, step);
        },
        [&](int step, T* halo) {
          const int k = halo_channel(step);
          if (!kPrologue || args.c == nullptr || k >= product.depth) return;
          differentiate_halo<T, kPackets>(args, plan, first_row, k, halo);
        });
    ColumnSums unused;
    const int own = packet_column(thread_index()), valid = product.columns - first_column - own;
    const int64_t first = first_row * product.columns + first_column + own;
    for_each_packet<false>(acc, reinterpret_cast<float*>(memory), product.rows_of_tile(tile), unused,
                           [&](int row, float (&value)[kPacket]) {
                             const int64_t place = first + int64_t(row) * product.columns;
                             if (valid > 0) store_gradient<T>(args, place, valid, plan.packets_out, value);
                           });
  }
}

cudaError_t conv3x3_backward_input(const Conv3x3BnBackwardInput& args, cudaStream_t stream) {
  if (args.rows * (args.in_channels + args.out_channels) == 0) return cudaSuccess;
  if (!halo_fits(args.width)) return cudaErrorInvalidValue;
  DeviceLimits limits;
  const cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  Conv3x3BackwardInputPlan plan{};
  // without columns dc has to be made all the same
  plan.product = plan_product(args.rows, std::max<int64_t>(args.in_channels, 1), args.out_channels, limits);
  plan.product.columns = int(args.in_channels);
  plan.halo = plan_halo(args.height, args.width, args.rows);
  plan.packets_in = args.out_channels % kPacket == 0 && args.in_channels % kPacket == 0 &&
                    aligned_to_16(args.dy, args.c, args.dc, args.scale, args.shift, args.grads.A, args.grads.B,
                                  args.grads.K, args.weight);
  plan.packets_out = args.in_channels % kPacket == 0 && aligned_to_16(args.dx, args.shortcut_dy);
  const std::true_type yes;
  const auto start = [&](auto type, auto packets, auto prologue) {
    return launch(conv3x3_backward_input_kernel<typename decltype(type)::type, packets, prologue>,
                  dim3(unsigned(plan.product.column_tiles), unsigned(plan.product.groups)), dim3(kProductThreads),
                  stream, args, plan);
  };
  return for_half_dtype(args.dtype, [&](auto type) {
    if (!plan.packets_in) return start(type, std::false_type(), yes);
    return for_flag(args.c != nullptr, [&](auto prologue) { return start(type, yes, prologue); });
  });
}

}  // namespace fusedres::cuda
