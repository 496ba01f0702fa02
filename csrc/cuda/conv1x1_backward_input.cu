// The input gradient of a 1x1 convolution: BN's backward before the product, the shortcut's gradient after it. The
// inner dimension is that of dy and c in memory, and the rows of the weight.
#include "conv_backward.h"
#include "launch.h"

namespace fusedres::cuda {

struct Conv1x1BackwardInputPlan {
  ProductPlan product;
  bool packets_in;   // rows of dy, c, dc and the weight are whole chunks at multiples of 16 bytes, and the vectors too
  bool packets_out;  // the same of dx and shortcut_dy
};

// Makes dc of this thread's chunks of dy, in their place in shared memory. c: the same chunks of c; k: the first of
// their channels
template <class T, bool kPackets, bool kTraining, Relu kRelu>
__device__ __forceinline__ void differentiate_chunks(const Conv1x1BackwardInput& args, int k,
                                                     T* const (&at)[kChunksOfThread],
                                                     const uint4 (&c)[kChunksOfThread]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const ChannelVectors vectors(args, k + half * kHalf, kPackets, kTraining, kRelu);
#pragma unroll
    for (int i = 0; i < kChunksOfThread; ++i) {
      uint2* place = reinterpret_cast<uint2*>(at[i]) + half;
      const uint2 c_word = half == 0 ? make_uint2(c[i].x, c[i].y) : make_uint2(c[i].z, c[i].w);
      *place = differentiated<T>(*place, c_word, vectors, kTraining);
    }
  }
}

template <class T, bool kPackets, bool kTraining, Relu kRelu>
__global__ void __launch_bounds__(kProductThreads, kBlocksOf<kPackets && !(kTraining && kRelu == Relu::kAny)>)
    conv1x1_backward_input_kernel(Conv1x1BackwardInput args, Conv1x1BackwardInputPlan plan) {
  FUSEDRES_SHARED(OperandRow, memory, kProductRows);
  T* ring = reinterpret_cast<T*>(memory);
  float* staged = reinterpret_cast<float*>(memory);
  const ProductPlan& product = plan.product;
  const int depth = product.depth, first_column = product.first_column(int(blockIdx.x));
  for (int64_t tile = blockIdx.y; tile < product.row_tiles; tile += product.groups) {
    const ChunkThread<DepthInside> mine(thread_index());
    const int64_t first_place = (product.first_row(tile) + mine.row) * depth;  // in dy, c and dc
    const auto place = [&](int i) { return first_place + int64_t(i * mine.kRowStep) * depth; };
    bool has_row[kChunksOfThread];
#pragma unroll
    for (int i = 0; i < kChunksOfThread; ++i) has_row[i] = mine.row_of(i) < product.rows_of_tile(tile);
    uint4 c[kChunksOfThread] = {};  // of the step after the one that is multiplied
    const auto fetch = [&](int step) {
      const int k = step * kProductDepth + mine.column * kPacket;
#pragma unroll
      for (int i = 0; i < kChunksOfThread; ++i) {
        const int64_t at = k < depth && has_row[i] ? place(i) + k : 0;  // what is made of others is not used
        c[i] = load_word_part(static_cast<const T*>(args.c) + at, depth - k, kPackets);
      }
    };
    Accumulators acc;
    acc.clear();
    __syncthreads();  // the tile before this one was read from the ring's memory
    fetch(0);
    run_steps(
        ring, product.steps(),
        [&](int step, T* left, T* right) {
          const int k = step * kProductDepth + mine.column * kPacket;
          const ChunkThread<DepthOutside> mine_of_weight(thread_index());
          const int column = first_column + mine_of_weight.column * kPacket;
          const auto row = [&](int i) { return step * kProductDepth + mine_of_weight.row_of(i); };
          load_chunks<kPackets>(
              left, mine, [&](int i) { return static_cast<const T*>(args.dy) + place(i) + k; },
              [&](int i) { return has_row[i] ? depth - k : 0; });
          load_chunks<kPackets>(
              right, mine_of_weight,
              [&](int i) { return static_cast<const T*>(args.weight) + int64_t(row(i)) * product.columns + column; },
              [&](int i) { return row(i) < depth ? product.columns - column : 0; });
        },
        [&](int step, T* left, T*) {
          const int k = step * kProductDepth + mine.column * kPacket;
          if (k >= depth) return;  // the chunk is of zeros, and so are the weight's rows
          T* const at[] = {left + mine.place(0), left + mine.place(1)};
          differentiate_chunks<T, kPackets, kTraining, kRelu>(args, k, at,
                                                              c);  // of rows that do not exist too: not stored
          if (first_column > 0) return;
#pragma unroll
          for (int i = 0; i < kChunksOfThread; ++i)
            if (has_row[i]) {
              T* dc = static_cast<T*>(args.dc) + place(i) + k;
              if constexpr (kPackets) {
                *reinterpret_cast<uint4*>(dc) = *reinterpret_cast<const uint4*>(at[i]);
              } else {
                store_part(dc, read_chunk(at[i]), depth - k, false);
              }
            }
        },
        [&](int step, const T* left, const T* right) {
          fetch(step + 1);
          multiply_step<DepthInside, DepthOutside>(acc, left, right);
        });
    ColumnSums unused;
    const int own = packet_column(thread_index()), valid = product.columns - first_column - own;
    const int64_t first = product.first_row(tile) * product.columns + first_column + own;
    for_each_packet<false>(acc, staged, product.rows_of_tile(tile), unused, [&](int row, float (&value)[kPacket]) {
      if (valid > 0) store_gradient<T>(args, first + int64_t(row) * product.columns, valid, plan.packets_out, value);
    });
  }
}

cudaError_t conv1x1_backward_input(const Conv1x1BackwardInput& args, cudaStream_t stream) {
  if (args.rows * (args.in_channels + args.out_channels) == 0) return cudaSuccess;
  DeviceLimits limits;
  const cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  Conv1x1BackwardInputPlan plan{};
  // without columns dc has to be made all the same
  plan.product = plan_product(args.rows, std::max<int64_t>(args.in_channels, 1), args.out_channels, limits);
  plan.product.columns = int(args.in_channels);
  plan.packets_in = args.out_channels % kPacket == 0 && args.in_channels % kPacket == 0 &&
                    aligned_to_16(args.dy, args.c, args.dc, args.scale, args.shift, args.grads.A, args.grads.B,
                                  args.grads.K, args.weight);
  plan.packets_out = args.in_channels % kPacket == 0 && aligned_to_16(args.dx, args.shortcut_dy);
  return for_half_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return for_flag(args.grads.B != nullptr, [&](auto training) {
      const auto run = [&](auto kernel) {
        const dim3 blocks(unsigned(plan.product.column_tiles), unsigned(plan.product.groups));
        return launch(kernel, blocks, dim3(kProductThreads), stream, args, plan);
      };
      if (!plan.packets_in) return run(conv1x1_backward_input_kernel<T, false, training, Relu::kAny>);
      if constexpr (training) {
        if (!args.relu) return run(conv1x1_backward_input_kernel<T, true, true, Relu::kNone>);
        if (args.scale == args.grads.A) return run(conv1x1_backward_input_kernel<T, true, true, Relu::kScaleIsA>);
      }
      return run(conv1x1_backward_input_kernel<T, true, training, Relu::kAny>);
    });
  });
}

}  // namespace fusedres::cuda
