// The input gradient of a 1x1 convolution under BN whose output was never stored: [dz | a] times [weight_dz ;
// weight_a], through the ReLU below, and the sums of the BN below.
//
// dz, a and the ReLU's mask go together, so that errors of rounded weights would not average out: a weight is the sum
// of two terms of the activation dtype. A tile of the product has the columns of both terms side by side, 64 and 64,
// and half as many of the output.
#include "launch.h"
#include "product_output.h"
#include "weight_terms.h"

namespace fusedres::cuda {

constexpr int kTermPackets = kTermColumns / kPacket;       // 8, of a row of the output
constexpr int kTermRows = kProductThreads / kTermPackets;  // 32 rows side by side

struct Conv1x1GramBackwardInputPlan {
  ProductPlan product;  // its columns are those of both terms
  TermsPlan terms;
  bool packets_in;   // rows of dy and c are whole chunks at multiples of 16 bytes, and the vectors too
  bool packets_out;  // the same of dz_below and c
};

// Of a thread's rows, of its 8 channels.
struct GradientSums {
  float dz[kPacket] = {}, centered[kPacket] = {};
};

// dz_below of a row's 8 channels, `valid` of which exist, added to the sums.
// at: the staged row's packet; vectors: [4][64] in shared memory, scale, shift, mean and offset from these channels on
template <class T>
__device__ __forceinline__ void store_below(const Conv1x1GramBackwardInput& args, const float* at, const float* vectors,
                                            int64_t place, int valid, bool packets, GradientSums& sums) {
  const Packet<T, kPacket> c = load_part(static_cast<const T*>(args.c) + place, valid, packets);
  Packet<T, kPacket> out;
  float value[kPacket], vector[kPacket];
  read_packet(value, at);
  read_packet(vector, at + kTermColumns);
#pragma unroll
  for (int i = 0; i < kPacket; ++i)  // an infinity of a row times a rest of 0 is NaN, and the first term has it
    value[i] += isfinite(vector[i]) ? vector[i] / kRestScale<T> : 0.f;
  read_packet(vector, vectors + 3 * kTermColumns);
#pragma unroll
  for (int i = 0; i < kPacket; ++i) value[i] += vector[i];
  float scale[kPacket];
  read_packet(scale, vectors);
  read_packet(vector, vectors + kTermColumns);
#pragma unroll
  for (int i = 0; i < kPacket; ++i) {
    const bool kept = passes(to_float(round_to<T>(affine(to_float(c.value[i]), scale[i], vector[i]))));
    out.value[i] = round_to<T>(kept ? value[i] : 0.f);
  }
  store_part(static_cast<T*>(args.dz_below) + place, out, valid, packets);
  read_packet(vector, vectors + 2 * kTermColumns);
#pragma unroll
  for (int i = 0; i < kPacket; ++i) {
    const float dz = to_float(out.value[i]);
    sums.dz[i] += dz;
    sums.centered[i] = fmaf(dz, to_float(c.value[i]) - vector[i], sums.centered[i]);
  }
}

// Scale, shift, mean and offset of the tile's columns, 0 beyond the last. vectors: [4][64] in shared memory
__device__ __forceinline__ void load_vectors_below(const Conv1x1GramBackwardInput& args, const float* offset,
                                                   int first_column, float* vectors) {
  const int thread = thread_index(), which = thread / kTermColumns, column = first_column + thread % kTermColumns;
  const float* from = which == 0 ? args.scale : which == 1 ? args.shift : which == 2 ? args.mean : offset;
  vectors[thread] = from != nullptr && column < args.in_channels ? from[column] : 0.f;
}

static_assert(4 * kTermColumns == kProductThreads && 4 * kTermColumns <= kOutputVectors * kProductSide);
static_assert(2 * kTermRows * kTermColumns <= kStagedFloats);

// Adds the sums of a tile to those of the block: thread i < 64 has sum dz of column i, thread 64 + i the other.
// shared: [2][32][64] floats, of no other use
__device__ __forceinline__ void add_sums(double& total, const GradientSums& sums, float* shared) {
  const int thread = thread_index();
  float* mine = shared + thread / kTermPackets * kTermColumns + thread % kTermPackets * kPacket;
  write_packet(mine, sums.dz);
  write_packet(mine + kTermRows * kTermColumns, sums.centered);
  __syncthreads();
  if (thread >= kProductSide) return;
  const float* first = shared + thread / kTermColumns * kTermRows * kTermColumns + thread % kTermColumns;
  for (int row = 0; row < kTermRows; ++row) total += double(first[row * kTermColumns]);
}

// offset: null with frozen statistics; workspace: as ProductPlan has it, a block leaves 128 sums in it
template <class T, bool kPackets>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks)
    conv1x1_gram_backward_input_kernel(Conv1x1GramBackwardInput args, Conv1x1GramBackwardInputPlan plan, const T* terms,
                                       const float* offset, void* workspace) {
  FUSEDRES_SHARED(OperandRow, memory, kProductRows);
  T* ring = reinterpret_cast<T*>(memory);
  float* staged = reinterpret_cast<float*>(memory);
  float* vectors = staged + kStagedFloats;
  const ProductPlan& product = plan.product;
  const int cout = int(args.out_channels), cin = int(args.in_channels);
  const int first_column = int(blockIdx.x) * kTermColumns;
  double total = 0.;
  for (int64_t tile = blockIdx.y; tile < product.row_tiles; tile += product.groups) {
    const int64_t first_row = product.first_row(tile);
    const int rows = product.rows_of_tile(tile);
    unsigned bits[kChunksOfThread] = {};  // of the step after the one that is multiplied
    const auto fetch = [&](int step) {
      const ChunkThread<DepthInside> mine(thread_index());
      const int k = step * kProductDepth + mine.column * kPacket, valid = cout - k;
#pragma unroll
      for (int i = 0; i < kChunksOfThread; ++i)
        if (args.mask != nullptr && valid > 0 && mine.row_of(i) < rows)
          bits[i] = chunk_bits<kPackets>(args.mask, (first_row + mine.row_of(i)) * cout + k,
                                         valid < kPacket ? valid : kPacket);
    };
    Accumulators acc;
    acc.clear();
    __syncthreads();  // the tile before this one was read from the ring's memory
    fetch(0);
    run_steps(
        ring, plan.terms.steps,
        [&](int step, T* left, T* right) {
          const ChunkThread<DepthInside> mine(thread_index());
          const ChunkThread<DepthOutside> mine_of_terms(thread_index());
          const bool of_dz = step < plan.terms.dz_steps;
          const int depth = of_dz ? cout : cin;
          const int k = (of_dz ? step : step - plan.terms.dz_steps) * kProductDepth + mine.column * kPacket;
          const T* first = static_cast<const T*>(of_dz ? args.dy : args.c) + first_row * depth + k;
          const T* of_terms = terms + int64_t(step) * kProductDepth * plan.terms.stride() +
                              int64_t(blockIdx.x) * kProductSide + mine_of_terms.column * kPacket;
#pragma unroll
          for (int i = 0; i < kChunksOfThread; ++i) {
            load_chunk(left + mine.place(i), first + int64_t(mine.row_of(i)) * depth,
                       mine.row_of(i) < rows ? depth - k : 0, kPackets);
            load_chunk(right + mine_of_terms.place(i), of_terms + mine_of_terms.row_of(i) * plan.terms.stride(),
                       kPacket, true);
          }
        },
        [&](int step, T* left, T*) {
          const ChunkThread<DepthInside> mine(thread_index());
          if (step < plan.terms.dz_steps) {
            if (args.mask == nullptr) return;
#pragma unroll
            for (int i = 0; i < kChunksOfThread; ++i) select_chunk(left + mine.place(i), bits[i]);
            return;
          }
          const int k = (step - plan.terms.dz_steps) * kProductDepth + mine.column * kPacket;
          if (k >= cin) return;
          float scale[kPacket], shift[kPacket];
          read_vector_chunk<kPackets>(scale, args.scale, k, cin);
          read_vector_chunk<kPackets>(shift, args.shift, k, cin);
#pragma unroll
          for (int i = 0; i < kChunksOfThread; ++i) activate_chunk(left + mine.place(i), scale, shift);
        },
        [&](int step, const T* left, const T* right) {
          fetch(step + 1);
          multiply_step<DepthInside, DepthOutside>(acc, left, right);
        });
    load_vectors_below(args, offset, first_column, vectors);
    GradientSums sums;
    const int thread = thread_index(), own = thread % kTermPackets * kPacket, valid = cin - first_column - own;
    const int64_t place = first_row * cin + first_column + own;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half > 0) __syncthreads();
      stage_half(acc, staged, half);
      __syncthreads();
#pragma unroll 1
      for (int staged_row = thread / kTermPackets; staged_row < kStagedRows; staged_row += kTermRows) {
        const int row = staged_tile_row(staged_row, half);
        if (row >= rows || valid <= 0) break;
        store_below<T>(args, staged + staged_row * kStagedStride + own, vectors + own, place + int64_t(row) * cin,
                       valid, plan.packets_out, sums);
      }
    }
    __syncthreads();
    add_sums(total, sums, staged);
  }
  const int thread = int(threadIdx.x);
  __syncthreads();
  if (product.groups > 1) {
    double* partials = partial_results(workspace, product);
    if (thread < kProductSide) partials[product.partial_of(blockIdx.x, blockIdx.y)] = total;
    if (!is_last_group(reinterpret_cast<int*>(memory), workspace, product)) return;
    total = 0.;
    if (thread < kProductSide)
      for (int group = 0; group < product.groups; ++group)
        total += __ldcg(partials + product.partial_of(blockIdx.x, group));
  }
  const int column = first_column + thread % kTermColumns;
  if (thread < kProductSide && column < cin)
    (thread < kTermColumns ? args.sum_dz : args.sum_dz_centered)[column] = float(total);
}

namespace {
Conv1x1GramBackwardInputPlan plan_of(const Conv1x1GramBackwardInput& args, const DeviceLimits& limits) {
  Conv1x1GramBackwardInputPlan plan{};
  plan.terms = plan_terms(args);
  plan.product = plan_product(args.rows, plan.terms.stride(), args.out_channels, limits);
  plan.packets_in = args.out_channels % kPacket == 0 && args.in_channels % kPacket == 0 &&
                    aligned_to_16(args.dy, args.c, args.scale, args.shift);
  plan.packets_out = args.in_channels % kPacket == 0 && aligned_to_16(args.c, args.dz_below);
  return plan;
}

// The workspace in bytes: partial results, the moved offset, the terms.
struct Places {
  int64_t offset, terms, end;

  Places(const Conv1x1GramBackwardInput& args, const Conv1x1GramBackwardInputPlan& plan)
      : offset(ceil_div(int64_t(plan.product.workspace_bytes()), 16) * 16),
        terms(offset + ceil_div(args.in_channels, 4) * 16),
        end(terms + plan.terms.elements() * 2) {}
};
}  // namespace

size_t conv1x1_gram_backward_input_workspace(const Conv1x1GramBackwardInput& args) {
  DeviceLimits limits;
  if (args.in_channels == 0 || current_device_limits(&limits) != cudaSuccess) return 0;
  return size_t(Places(args, plan_of(args, limits)).end);
}

cudaError_t conv1x1_gram_backward_input(const Conv1x1GramBackwardInput& args, Workspace& workspace,
                                        cudaStream_t stream) {
  if (args.in_channels == 0) return cudaSuccess;
  DeviceLimits limits;
  cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  const Conv1x1GramBackwardInputPlan plan = plan_of(args, limits);
  const Places places(args, plan);
  error = prepare_workspace(workspace, size_t(places.end), plan.product.counter_bytes(), stream);
  if (error != cudaSuccess) return error;
  char* memory = static_cast<char*>(workspace.data);
  float* offset = args.weight_a == nullptr ? nullptr : reinterpret_cast<float*>(memory + places.offset);
  return for_half_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* terms = reinterpret_cast<T*>(memory + places.terms);
    const int64_t parts = plan.terms.steps + (offset != nullptr);
    const cudaError_t error = launch(split_weights_kernel<T>, dim3(unsigned(parts * plan.product.column_tiles)),
                                     dim3(kSplitThreads), stream, args, plan.terms, terms, offset);
    if (error != cudaSuccess) return error;
    return for_flag(plan.packets_in, [&](auto packets) {
      return launch(conv1x1_gram_backward_input_kernel<T, packets>,
                    dim3(unsigned(plan.product.column_tiles), unsigned(plan.product.groups)), dim3(kProductThreads),
                    stream, args, plan, static_cast<const T*>(terms), static_cast<const float*>(offset),
                    workspace.data);
    });
  });
}

}  // namespace fusedres::cuda
