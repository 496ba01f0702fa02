// First two moments of an activation made in the prologue: `m = E[a]`, `S = E[(a-m)(a-m)^T]`. Products are of a less a
// reference, in the activation dtype, and S is symmetric: tiles below the diagonal are not computed.
#include "launch.h"
#include "rows_product.h"
#include "sample.h"

namespace fusedres::cuda {

// reference [C]: where a's mean is far from 0 that mean, rounded, so that a - reference is exact; else 0.
template <class T>
__global__ void __launch_bounds__(kSampleThreads) gram_reference_kernel(Gram args, T* reference) {
  const int i = int(blockIdx.x) * kSampleThreads + int(threadIdx.x);
  if (i >= args.channels) return;
  const Sample found = sample(static_cast<const T*>(args.c), args.scale, args.shift, args.rows, int(args.channels), i);
  reference[i] = round_to<T>(found.far ? found.mean : 0.f);
}

template <class T, bool kPackets>
__global__ void __launch_bounds__(kProductThreads, kBlocksOf<kPackets>)
    gram_kernel(Gram args, RowsPlan product, const T* reference, float* workspace) {
  FUSEDRES_SHARED(OperandRow, memory, kProductRows);
  T* ring = reinterpret_cast<T*>(memory);
  const int64_t first_row = product.first_row(blockIdx.y);
  const int rows = int(product.rows_from(first_row));
  int right_tile;
  const int left_tile = product.left_tile(blockIdx.x, &right_tile);
  const T* first = static_cast<const T*>(args.c) + first_row * product.left;
  const RowsOperand<T, kPackets> c_left{first, product.left, left_tile * kProductSide};
  const RowsOperand<T, kPackets> c_right{first, product.right, right_tile * kProductSide};
  const bool diagonal = c_left.channel == c_right.channel;  // both operands are one
  const int own_place = ChunkThread<DepthOutside>(int(threadIdx.x)).place(0);
  LeftSums sums;
  Accumulators acc;
  acc.clear();
  run_steps(
      ring, int(ceil_div(rows, kProductDepth)),
      [&](int step, T* left, T* right) {
        const OwnChunks me(own_place);
        c_left.load(me, left, step, rows);
        if (!diagonal) c_right.load(me, right, step, rows);
      },
      [&](int step, T* left, T* right) {
        const OwnChunks me(own_place);
        c_left.center(me, left, step, rows, args.scale, args.shift, reference);
        if (!diagonal) c_right.center(me, right, step, rows, args.scale, args.shift, reference);
      },
      [&](int, const T* left, const T* right) {
        multiply_rows(acc, left, diagonal ? left : right);
        if (diagonal) sums.add(left);
      });
  store_partial(acc, reinterpret_cast<float*>(memory), workspace, product, c_left.channel, c_right.channel);
  if (diagonal) sums.store(workspace + product.sums_of(blockIdx.y) + c_left.channel, product.left - c_left.channel);
}

// One thread for each element of S. Differences of large numbers are formed in float64.
template <class T>
__global__ void __launch_bounds__(kPacketThreads)
    merge_gram_kernel(Gram args, RowsPlan plan, const T* reference, const float* workspace) {
  const int64_t element = int64_t(blockIdx.x) * kPacketThreads + int(threadIdx.x);
  if (element >= int64_t(plan.left) * plan.left) return;
  const int i = int(element / plan.left), j = int(element - int64_t(i) * plan.left);
  const int64_t upper = int64_t(i < j ? i : j) * plan.left + (i < j ? j : i);
  const double rows = double(plan.rows);
  const double di = sum_of_splits(workspace + i, plan.left, plan.splits) / rows;
  const double dj = sum_of_splits(workspace + j, plan.left, plan.splits) / rows;
  const double product =
      sum_of_splits(workspace + plan.products_of(0) + upper, int64_t(plan.left) * plan.left, plan.splits);
  // d - d is 0, or NaN where a channel has an infinity: its deviations from the mean are NaN
  args.S[element] = float(product / rows - di * dj + (di - di) + (dj - dj));
  if (j == 0) args.m[i] = float(double(to_float(reference[i])) + di);
}

namespace {
RowsPlan plan_of(const Gram& args, const DeviceLimits& limits) {
  return plan_rows(args.rows, args.channels, args.channels, true, limits);
}
// bytes, whole words of 16
int64_t reference_bytes(const Gram& args) { return ceil_div(args.channels, kPacket) * 16; }
}  // namespace

size_t gram_workspace(const Gram& args) {
  DeviceLimits limits;
  if (args.channels == 0 || current_device_limits(&limits) != cudaSuccess) return 0;
  return size_t(reference_bytes(args) + plan_of(args, limits).floats() * 4);
}

cudaError_t gram(const Gram& args, Workspace& workspace, cudaStream_t stream) {
  if (args.channels == 0) return cudaSuccess;
  DeviceLimits limits;
  cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  const RowsPlan plan = plan_of(args, limits);
  error = prepare_workspace(workspace, size_t(reference_bytes(args) + plan.floats() * 4));
  if (error != cudaSuccess) return error;
  float* partials = reinterpret_cast<float*>(static_cast<char*>(workspace.data) + reference_bytes(args));
  const bool packets = args.channels % kPacket == 0 && aligned_to_16(args.c, args.scale, args.shift);
  return for_half_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* made = static_cast<T*>(workspace.data);
    const T* reference = made;
    const dim3 blocks(unsigned(ceil_div(args.channels, kSampleThreads)));
    cudaError_t error = launch(gram_reference_kernel<T>, blocks, dim3(kSampleThreads), stream, args, made);
    if (error != cudaSuccess) return error;
    error = for_flag(packets, [&](auto in_packets) {
      return launch(gram_kernel<T, in_packets>, dim3(unsigned(plan.tiles), unsigned(plan.splits)),
                    dim3(kProductThreads), stream, args, plan, reference, partials);
    });
    if (error != cudaSuccess) return error;
    const int64_t merging = ceil_div(args.channels * args.channels, kPacketThreads);
    return launch(merge_gram_kernel<T>, dim3(unsigned(merging)), dim3(kPacketThreads), stream, args, plan, reference,
                  static_cast<const float*>(partials));
  });
}

}  // namespace fusedres::cuda
