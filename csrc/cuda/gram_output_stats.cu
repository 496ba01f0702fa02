// Statistics of a 1x1 convolution's output from the moments of its input: `W m + bias` and `diag(W S W^T)`, in float64.
#include "float64_product.h"

namespace fusedres::cuda {

constexpr int kStatsThreads = 128;

// partials [column tiles][2][out_channels]: of each tile of columns of W S, what it adds to mean and var
template <class T>
__global__ void __launch_bounds__(kFloat64Threads, kFloat64Blocks)
    gram_output_stats_kernel(GramOutputStats args, double* partials) {
  FUSEDRES_SHARED(double, shared, kFloat64Doubles);
  const int cin = int(args.in_channels), cout = int(args.out_channels), column_tiles = float64_tiles(cin);
  const int first_row = int(blockIdx.x / column_tiles) * kFloat64Side;
  const int column_tile = int(blockIdx.x % column_tiles), first_column = column_tile * kFloat64Side;
  const Float64Weight<T> weight{static_cast<const T*>(args.weight), cout, cin};
  Float64Tile product;
  multiply_by_moments(product, shared, weight, args.S, first_row, first_column);
  // [2][64][17]: each thread's part of a row
  double* parts[2] = {shared, shared + kFloat64Side * (kFloat64Lanes + 1)};
  const int lane = int(threadIdx.x) % kFloat64Lanes;
#pragma unroll
  for (int i = 0; i < kFloat64Each; ++i) {
    double mean = 0., var = 0.;
#pragma unroll
    for (int j = 0; j < kFloat64Each; ++j) {
      const int column = first_column + Float64Tile::column(j);
      const double w = weight(first_row + Float64Tile::row(i), column);
      if (column >= cin) continue;
      mean = fma(w, double(args.m[column]), mean);
      var = fma(product.value[i][j], w, var);
    }
    parts[0][Float64Tile::row(i) * (kFloat64Lanes + 1) + lane] = mean;
    parts[1][Float64Tile::row(i) * (kFloat64Lanes + 1) + lane] = var;
  }
  __syncthreads();
  const int which = int(threadIdx.x) / kFloat64Side, row = int(threadIdx.x) % kFloat64Side;
  if (which >= 2 || first_row + row >= cout) return;
  double sum = 0.;
  for (int part = 0; part < kFloat64Lanes; ++part)
    sum += shared[(which * kFloat64Side + row) * (kFloat64Lanes + 1) + part];
  partials[(int64_t(column_tile) * 2 + which) * cout + first_row + row] = sum;
}

// One thread for each channel of the output, and for each of the input.
template <class T>
__global__ void __launch_bounds__(kStatsThreads)
    merge_gram_output_stats_kernel(GramOutputStats args, const double* partials) {
  const int64_t i = int64_t(blockIdx.x) * kStatsThreads + int(threadIdx.x);
  if (i < args.in_channels) args.center[i] = to_float(round_to<T>(args.m[i]));
  if (i >= args.out_channels) return;
  double mean = args.bias == nullptr ? 0. : double(to_float(static_cast<const T*>(args.bias)[i])), var = 0.;
  for (int tile = 0; tile < float64_tiles(args.in_channels); ++tile) {
    mean += partials[int64_t(tile) * 2 * args.out_channels + i];
    var += partials[(int64_t(tile) * 2 + 1) * args.out_channels + i];
  }
  args.mean[i] = float(mean);
  args.var[i] = var < 0. ? 0.f : float(var);  // NaN stays
}

size_t gram_output_stats_workspace(const GramOutputStats& args) {
  return size_t(float64_tiles(args.in_channels) * 2 * args.out_channels) * sizeof(double);
}

cudaError_t gram_output_stats(const GramOutputStats& args, Workspace& workspace, cudaStream_t stream) {
  if (args.in_channels * args.out_channels == 0) return cudaSuccess;
  const cudaError_t too_small = prepare_workspace(workspace, gram_output_stats_workspace(args));
  if (too_small != cudaSuccess) return too_small;
  double* partials = static_cast<double*>(workspace.data);
  return for_half_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t tiles = int64_t(float64_tiles(args.out_channels)) * float64_tiles(args.in_channels);
    const cudaError_t error =
        launch(gram_output_stats_kernel<T>, dim3(unsigned(tiles)), dim3(kFloat64Threads), stream, args, partials);
    if (error != cudaSuccess) return error;
    const int64_t blocks = ceil_div(std::max(args.in_channels, args.out_channels), kStatsThreads);
    return launch(merge_gram_output_stats_kernel<T>, dim3(unsigned(blocks)), dim3(kStatsThreads), stream, args,
                  static_cast<const double*>(partials));
  });
}

}  // namespace fusedres::cuda
