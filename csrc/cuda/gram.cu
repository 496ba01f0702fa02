// First two moments of an activation made in the prologue: `m = E[a]`, `S = E[(a-m)(a-m)^T]`. Products are of a less a
// reference, in the activation dtype, and S is symmetric: tiles below the diagonal are not computed.
#include "launch.h"
#include "rows_product.h"
#include "sample.h"

namespace fusedres::cuda {

struct GramPlan {
  RowsPlan product;
  bool packets;  // rows of c are whole chunks at multiples of 16 bytes, and the vectors too
};

// reference [C]: where a's mean is far from 0 that mean, rounded, so that a - reference is exact; else 0.
template <class T>
__global__ void __launch_bounds__(kSampleThreads) gram_reference_kernel(Gram args, float* reference) {
  const int i = int(blockIdx.x) * kSampleThreads + int(threadIdx.x);
  if (i >= args.channels) return;
  const Sample found = sample(static_cast<const T*>(args.c), args.scale, args.shift, args.rows, int(args.channels), i);
  reference[i] = found.far ? to_float(round_to<T>(found.mean)) : 0.f;
}

template <class T>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks)
    gram_kernel(Gram args, GramPlan plan, const float* reference, float* workspace) {
  FUSEDRES_SHARED(uint4, memory, kProductWords);
  T* ring = reinterpret_cast<T*>(memory);
  const RowsPlan& product = plan.product;
  const int64_t first_row = product.first_row(blockIdx.y);
  const int rows = int(product.rows_from(first_row));
  int right_tile;
  const int left_tile = product.left_tile(blockIdx.x, &right_tile);
  const T* first = static_cast<const T*>(args.c) + first_row * product.left;
  const RowsOperand<T> c_left{first, product.left, left_tile * kProductSide, plan.packets};
  const RowsOperand<T> c_right{first, product.right, right_tile * kProductSide, plan.packets};
  ChunkSums sums = {};
  Accumulators acc;
  acc.clear();
  run_steps(
      ring, int(ceil_div(rows, kProductDepth)),
      [&](int step, T* left, T* right) {
        c_left.load(left, step, rows);
        c_right.load(right, step, rows);
      },
      [&](int step, T* left, T* right) {
        center_chunks<1>(left, c_left, step, rows, args.scale, args.shift, reference, &sums);
        center_chunks<1>(right, c_right, step, rows, args.scale, args.shift, reference,
                         static_cast<ChunkSums*>(nullptr));
      },
      [&](int, const T* left, const T* right) { multiply_rows(acc, left, right); });
  store_partial(acc, sums, reinterpret_cast<float*>(memory), workspace, product, left_tile, right_tile,
                left_tile == right_tile);
}

// One thread for each element of S. Differences of large numbers are formed in float64.
__global__ void __launch_bounds__(kPacketThreads)
    merge_gram_kernel(Gram args, RowsPlan plan, const float* reference, const float* workspace) {
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
  if (j == 0) args.m[i] = float(double(reference[i]) + di);
}

namespace {
RowsPlan plan_of(const Gram& args, const DeviceLimits& limits) {
  return plan_rows(args.rows, args.channels, args.channels, true, limits);
}
int64_t reference_floats(const Gram& args) { return ceil_div(args.channels, 4) * 4; }
}  // namespace

size_t gram_workspace(const Gram& args) {
  DeviceLimits limits;
  if (args.channels == 0 || current_device_limits(&limits) != cudaSuccess) return 0;
  return size_t(reference_floats(args) + plan_of(args, limits).floats()) * 4;
}

cudaError_t gram(const Gram& args, const Workspace& workspace, cudaStream_t stream) {
  if (args.channels == 0) return cudaSuccess;
  DeviceLimits limits;
  cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  GramPlan plan{};
  plan.product = plan_of(args, limits);
  if (workspace.bytes < size_t(reference_floats(args) + plan.product.floats()) * 4 || !aligned_to_16(workspace.data))
    return cudaErrorInvalidValue;
  float* reference = static_cast<float*>(workspace.data);
  float* partials = reference + reference_floats(args);
  plan.packets = args.channels % kPacket == 0 && aligned_to_16(args.c, args.scale, args.shift);
  error = for_half_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const dim3 blocks(unsigned(ceil_div(args.channels, kSampleThreads)));
    const cudaError_t error = launch(gram_reference_kernel<T>, blocks, dim3(kSampleThreads), stream, args, reference);
    if (error != cudaSuccess) return error;
    return launch(gram_kernel<T>, dim3(unsigned(plan.product.tiles), unsigned(plan.product.splits)),
                  dim3(kProductThreads), stream, args, plan, static_cast<const float*>(reference), partials);
  });
  if (error != cudaSuccess) return error;
  const int64_t blocks = ceil_div(args.channels * args.channels, kPacketThreads);
  return launch(merge_gram_kernel, dim3(unsigned(blocks)), dim3(kPacketThreads), stream, args, plan.product,
                static_cast<const float*>(reference), static_cast<const float*>(partials));
}

}  // namespace fusedres::cuda
