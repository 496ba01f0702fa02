// Backward of BN over a 1x1 convolution whose output was never stored: its algebra on weights and moments, in float64.
// With frozen statistics the first kernel is all there is.
#include "float64_product.h"

namespace fusedres::cuda {

constexpr int kRowThreads = 128;
constexpr int kFewestOfSplit = 64;  // channels that a block of weight_a sums over
constexpr int kOffsetThreads = 256;
constexpr int kOffsetColumns = 16;
constexpr int kOffsetRows = kOffsetThreads / kOffsetColumns;

// The products W^T (B W), [in_channels, in_channels], cut along the inner dimension: there are few tiles, and the
// inner dimension, out_channels, is long.
struct GramCoefficientsPlan {
  int tiles;     // along each side
  int of_split;  // of out_channels
  int splits;    // blockIdx.y
  FUSEDRES_HOST_DEVICE constexpr int64_t partials_of(int64_t split, int64_t in_channels) const {
    return split * in_channels * in_channels;
  }
};

// Of output channel o: R = dz^T (a - m), of the convolution's input a and its mean m, from Rc = dz^T (a - center). With
// frozen statistics R is Rc.
struct CenteredGradient {
  const GramBackwardCoefficients& args;
  int o;
  double sum_dz;

  __device__ __forceinline__ CenteredGradient(const GramBackwardCoefficients& args, int o)
      : args(args), o(o), sum_dz(double(args.sum_dz[o])) {}

  __device__ __forceinline__ double operator()(int k) const {
    const double rc = double(args.r[o * args.in_channels + k]);
    return args.m == nullptr ? rc : rc - sum_dz * (double(args.m[k]) - double(args.center[k]));
  }
};

// One block for each output channel: dweight, weight_dz, and B, or with frozen statistics dW.
// slope [out_channels]: B
template <class T>
__global__ void __launch_bounds__(kRowThreads) gram_rows_kernel(GramBackwardCoefficients args, double* slope) {
  FUSEDRES_SHARED(double, parts, kRowThreads);
  const int o = int(blockIdx.x), thread = int(threadIdx.x), cin = int(args.in_channels);
  const T* weight = static_cast<const T*>(args.weight) + int64_t(o) * cin;
  const CenteredGradient r(args, o);
  const bool frozen = args.m == nullptr;
  const double A = double(args.scale[o]);
  double part = 0.;
  for (int k = thread; k < cin; k += kRowThreads) {
    const double w = double(to_float(weight[k]));
    part = fma(r(k), w, part);
    args.weight_dz[int64_t(o) * cin + k] = float(A * w);
    if (frozen) args.dW[int64_t(o) * cin + k] = float(A * r(k));
  }
  parts[thread] = part;
  for (int half = kRowThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) parts[thread] += parts[thread + half];
  }
  if (thread > 0) return;
  double centered = parts[0];  // sum dz*(c - mean)
  if (frozen) {
    const double bias = args.bias == nullptr ? 0. : double(to_float(static_cast<const T*>(args.bias)[o]));
    centered += (bias - double(args.mean[o])) * r.sum_dz;
  }
  const double invstd = double(args.invstd[o]);
  args.dweight[o] = float(invstd * centered);
  if (!frozen) slope[o] = double(float(-A * invstd * invstd * centered / double(args.rows)));
}

// dW = A*R + B*(W (P*S)), a tile a block.
template <class T>
__global__ void __launch_bounds__(kFloat64Threads, kFloat64Blocks)
    gram_weight_gradient_kernel(GramBackwardCoefficients args, const double* slope) {
  FUSEDRES_SHARED(double, shared, kFloat64Doubles);
  const int cin = int(args.in_channels), cout = int(args.out_channels), column_tiles = float64_tiles(cin);
  const int first_row = int(blockIdx.x / column_tiles) * kFloat64Side;
  const int first_column = int(blockIdx.x % column_tiles) * kFloat64Side;
  const Float64Weight<T> weight{static_cast<const T*>(args.weight), cout, cin};
  Float64Tile product;
  multiply_by_moments(product, shared, weight, args.S, first_row, first_column);
#pragma unroll
  for (int i = 0; i < kFloat64Each; ++i) {
    const int o = first_row + Float64Tile::row(i);
    if (o >= cout) continue;
    const CenteredGradient r(args, o);
    const double A = double(args.scale[o]), B = slope[o] * double(args.rows);
#pragma unroll
    for (int j = 0; j < kFloat64Each; ++j) {
      const int k = first_column + Float64Tile::column(j);
      if (k < cin) args.dW[int64_t(o) * cin + k] = float(A * r(k) + B * product.value[i][j]);
    }
  }
}

// partials [splits][in_channels][in_channels]: W^T (B W) over a split of the output's channels.
template <class T>
__global__ void __launch_bounds__(kFloat64Threads, kFloat64Blocks)
    gram_weight_a_kernel(GramBackwardCoefficients args, GramCoefficientsPlan plan, const double* slope,
                         double* partials) {
  FUSEDRES_SHARED(double, shared, kFloat64Doubles);
  const int cin = int(args.in_channels), cout = int(args.out_channels);
  const int first_row = int(blockIdx.x / plan.tiles) * kFloat64Side;
  const int first_column = int(blockIdx.x % plan.tiles) * kFloat64Side;
  const int first = int(blockIdx.y) * plan.of_split;
  const int last = cout - first < plan.of_split ? cout : first + plan.of_split;
  const Float64Weight<T> weight{static_cast<const T*>(args.weight), cout, cin};
  Float64Tile product;
  multiply_float64<false>(
      product, shared, first, last, [&](int row, int o) { return weight(o, first_row + row); },
      [&](int o, int column) { return slope[o] * weight(o, first_column + column); });
  double* mine = partials + plan.partials_of(blockIdx.y, cin);
#pragma unroll
  for (int i = 0; i < kFloat64Each; ++i)
#pragma unroll
    for (int j = 0; j < kFloat64Each; ++j) {
      const int row = first_row + Float64Tile::row(i), column = first_column + Float64Tile::column(j);
      if (row < cin && column < cin) mine[int64_t(row) * cin + column] = product.value[i][j];
    }
}

// weight_a from its partial results, and offset = -(sum_dz/P) weight_dz - (m - center) weight_a; 16 columns a block.
template <class T>
__global__ void __launch_bounds__(kOffsetThreads, 2)
    gram_offset_kernel(GramBackwardCoefficients args, GramCoefficientsPlan plan, const double* partials) {
  FUSEDRES_SHARED(double, parts, kOffsetThreads);
  const int thread = int(threadIdx.x), cin = int(args.in_channels), cout = int(args.out_channels);
  const int column = int(blockIdx.x) * kOffsetColumns + thread % kOffsetColumns;
  const Float64Weight<T> weight{static_cast<const T*>(args.weight), cout, cin};
  double offset = 0.;
  if (column < cin) {
    for (int o = thread / kOffsetColumns; o < cout; o += kOffsetRows)
      offset -= double(args.sum_dz[o]) * (double(args.scale[o]) * weight(o, column));
    offset /= double(args.rows);
    for (int k = thread / kOffsetColumns; k < cin; k += kOffsetRows) {
      const int64_t place = int64_t(k) * cin + column;
      double sum = 0.;
      for (int split = 0; split < plan.splits; ++split) sum += partials[plan.partials_of(split, cin) + place];
      args.weight_a[place] = float(sum);
      offset -= (double(args.m[k]) - double(args.center[k])) * sum;
    }
  }
  parts[thread] = offset;
  __syncthreads();
  if (thread >= kOffsetColumns || column >= cin) return;
  for (int part = thread + kOffsetColumns; part < kOffsetThreads; part += kOffsetColumns) offset += parts[part];
  args.offset[column] = float(offset);
}

namespace {
GramCoefficientsPlan plan_of(const GramBackwardCoefficients& args, const DeviceLimits& limits) {
  GramCoefficientsPlan plan{};
  plan.tiles = float64_tiles(args.in_channels);
  const int64_t tiles = int64_t(plan.tiles) * plan.tiles;
  const int64_t wanted = int64_t(limits.multiprocessors) * kFloat64Blocks / tiles;
  const int64_t most = std::min<int64_t>(args.out_channels / kFewestOfSplit, kMaxGridY);
  const int64_t splits = std::max<int64_t>(1, std::min(wanted, most));
  plan.of_split = int(ceil_div(args.out_channels, splits));
  plan.splits = int(ceil_div(args.out_channels, plan.of_split));
  return plan;
}

int64_t doubles_of(const GramBackwardCoefficients& args, const GramCoefficientsPlan& plan) {
  return args.out_channels + plan.partials_of(plan.splits, args.in_channels);
}

template <class T>
cudaError_t launch_products(const GramBackwardCoefficients& args, const GramCoefficientsPlan& plan, double* slope,
                            cudaStream_t stream) {
  const double* given = slope;
  double* partials = slope + args.out_channels;
  const int64_t tiles = int64_t(float64_tiles(args.out_channels)) * plan.tiles;
  cudaError_t error =
      launch(gram_weight_gradient_kernel<T>, dim3(unsigned(tiles)), dim3(kFloat64Threads), stream, args, given);
  if (error != cudaSuccess) return error;
  const dim3 grid(unsigned(int64_t(plan.tiles) * plan.tiles), unsigned(plan.splits));
  error = launch(gram_weight_a_kernel<T>, grid, dim3(kFloat64Threads), stream, args, plan, given, partials);
  if (error != cudaSuccess) return error;
  const int64_t blocks = ceil_div(args.in_channels, kOffsetColumns);
  return launch(gram_offset_kernel<T>, dim3(unsigned(blocks)), dim3(kOffsetThreads), stream, args, plan,
                static_cast<const double*>(partials));
}
}  // namespace

size_t gram_backward_coefficients_workspace(const GramBackwardCoefficients& args) {
  DeviceLimits limits;
  if (args.in_channels * args.out_channels == 0 || args.m == nullptr || current_device_limits(&limits) != cudaSuccess)
    return 0;
  return size_t(doubles_of(args, plan_of(args, limits))) * sizeof(double);
}

cudaError_t gram_backward_coefficients(const GramBackwardCoefficients& args, Workspace& workspace,
                                       cudaStream_t stream) {
  if (args.in_channels * args.out_channels == 0) return cudaSuccess;
  cudaError_t error = prepare_workspace(workspace, gram_backward_coefficients_workspace(args));
  if (error != cudaSuccess) return error;
  DeviceLimits limits;
  error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  const GramCoefficientsPlan plan = plan_of(args, limits);
  double* slope = static_cast<double*>(workspace.data);
  return for_half_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const cudaError_t error =
        launch(gram_rows_kernel<T>, dim3(unsigned(args.out_channels)), dim3(kRowThreads), stream, args, slope);
    if (error != cudaSuccess || args.m == nullptr) return error;
    return launch_products<T>(args, plan, slope, stream);
  });
}

}  // namespace fusedres::cuda
