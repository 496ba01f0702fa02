// The input gradient of a 1x1 convolution: BN's backward before the product, the shortcut's gradient after it. The
// inner dimension is that of dy and c in memory, and the rows of the weight.
#include "launch.h"
#include "product_output.h"

namespace fusedres::cuda {

struct Conv1x1BackwardInputPlan {
  ProductPlan product;
  bool packets_in;      // rows of dy, c and dc are whole chunks at multiples of 16 bytes, and the vectors too
  bool packets_weight;  // the same of the weight
  bool packets_out;     // the same of dx and shortcut_dy
};

constexpr int kHalf = kPacket / 2;

// Four values of a channel vector, 0 past its end.
__device__ __forceinline__ float4 load_vector_half(const float* vector, int first, int channels, bool packets) {
  if (packets) return __ldg(reinterpret_cast<const float4*>(vector + first));
  const auto at = [&](int i) { return first + i < channels ? vector[first + i] : 0.f; };
  return make_float4(at(0), at(1), at(2), at(3));
}

template <class T>
struct HalfPacket {
  T value[kHalf];
};

// dc of 4 channels of a row, from dy and c.
template <class T>
__device__ __forceinline__ uint2 differentiated(const Conv1x1BackwardInput& args, uint2 dy_word, uint2 c_word,
                                                const float4 (&vectors)[5]) {
  HalfPacket<T> dy, c;
  memcpy(&dy, &dy_word, sizeof dy);
  memcpy(&c, &c_word, sizeof c);
  const float* scale = &vectors[0].x;
  const float* shift = &vectors[1].x;
  const float *A = &vectors[2].x, *B = &vectors[3].x, *K = &vectors[4].x;
  const bool training = args.grads.B != nullptr;
#pragma unroll
  for (int e = 0; e < kHalf; ++e) {
    const float c_value = to_float(c.value[e]);
    float dz = to_float(dy.value[e]);
    if (args.relu && !passes(to_float(round_to<T>(affine(c_value, scale[e], shift[e]))))) dz = 0.f;
    dy.value[e] = round_to<T>(apply_coefficients(dz, c_value, A[e], B[e], K[e], training));
  }
  memcpy(&dy_word, &dy, sizeof dy);
  return dy_word;
}

// Makes dc of this thread's chunks of dy, in their place in shared memory. c: the same chunks of c; k: the first of
// their channels. Four channels at a time: more vectors at once would not fit the registers.
template <class T>
__device__ __forceinline__ void differentiate_chunks(const Conv1x1BackwardInput& args, int k, bool packets,
                                                     T* const (&at)[kChunksOfThread], const uint4 (&c)[kChunksOfThread],
                                                     const bool (&has_row)[kChunksOfThread]) {
  const int channels = int(args.out_channels);
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const float4 zeros = make_float4(0.f, 0.f, 0.f, 0.f);
    float4 vectors[5] = {zeros, zeros, zeros, zeros, zeros};
    const auto load = [&](const float* vector) {
      return load_vector_half(vector, k + half * kHalf, channels, packets);
    };
    if (args.relu) vectors[0] = load(args.scale), vectors[1] = load(args.shift);
    vectors[2] = load(args.grads.A);
    if (args.grads.B != nullptr) vectors[3] = load(args.grads.B), vectors[4] = load(args.grads.K);
#pragma unroll
    for (int i = 0; i < kChunksOfThread; ++i) {
      uint2* place = reinterpret_cast<uint2*>(at[i]) + half;
      const uint2 c_word = half == 0 ? make_uint2(c[i].x, c[i].y) : make_uint2(c[i].z, c[i].w);
      if (has_row[i]) *place = differentiated<T>(args, *place, c_word, vectors);
    }
  }
}

// dx of a row's 8 channels, `valid` of which exist.
template <class T>
__device__ __forceinline__ void store_gradient(const Conv1x1BackwardInput& args, int64_t place, int valid, bool packets,
                                               const float (&value)[kPacket]) {
  Packet<T, kPacket> out, shortcut;
  unsigned bits = 0xffu;
  if (args.shortcut_dy != nullptr) {
    shortcut = load_part(static_cast<const T*>(args.shortcut_dy) + place, valid, packets);
    if (args.mask != nullptr) bits = bits_at(args.mask, place, valid < kPacket ? valid : kPacket);
  }
#pragma unroll
  for (int i = 0; i < kPacket; ++i) {
    const bool added = args.shortcut_dy != nullptr && (bits >> i & 1u);
    out.value[i] = round_to<T>(added ? value[i] + to_float(shortcut.value[i]) : value[i]);
  }
  store_part(static_cast<T*>(args.dx) + place, out, valid, packets);
}

template <class T>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks)
    conv1x1_backward_input_kernel(Conv1x1BackwardInput args, Conv1x1BackwardInputPlan plan) {
  FUSEDRES_SHARED(uint4, memory, kProductWords);
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
      for (int i = 0; i < kChunksOfThread; ++i)
        if (k < depth && has_row[i])
          c[i] = load_word_part(static_cast<const T*>(args.c) + place(i) + k, depth - k, plan.packets_in);
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
#pragma unroll
          for (int i = 0; i < kChunksOfThread; ++i) {
            load_chunk(left + mine.place(i), static_cast<const T*>(args.dy) + place(i) + k, has_row[i] ? depth - k : 0,
                       plan.packets_in);
            const int row = step * kProductDepth + mine_of_weight.row_of(i);
            load_chunk(right + mine_of_weight.place(i),
                       static_cast<const T*>(args.weight) + int64_t(row) * product.columns + column,
                       row < depth ? product.columns - column : 0, plan.packets_weight);
          }
        },
        [&](int step, T* left, T*) {
          const int k = step * kProductDepth + mine.column * kPacket;
          if (k >= depth) return;  // the chunk is of zeros, and so are the weight's rows
          T* const at[] = {left + mine.place(0), left + mine.place(1)};
          differentiate_chunks(args, k, plan.packets_in, at, c, has_row);
          if (first_column > 0) return;
#pragma unroll
          for (int i = 0; i < kChunksOfThread; ++i)
            if (has_row[i])
              store_part(static_cast<T*>(args.dc) + place(i) + k, read_chunk(at[i]), depth - k, plan.packets_in);
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
  plan.packets_in = args.out_channels % kPacket == 0 && aligned_to_16(args.dy, args.c, args.dc, args.scale, args.shift,
                                                                      args.grads.A, args.grads.B, args.grads.K);
  plan.packets_weight = args.in_channels % kPacket == 0 && aligned_to_16(args.weight);
  plan.packets_out = args.in_channels % kPacket == 0 && aligned_to_16(args.dx, args.shortcut_dy);
  return for_half_dtype(args.dtype, [&](auto type) {
    return launch(conv1x1_backward_input_kernel<typename decltype(type)::type>,
                  dim3(unsigned(plan.product.column_tiles), unsigned(plan.product.groups)), dim3(kProductThreads),
                  stream, args, plan);
  });
}

}  // namespace fusedres::cuda
