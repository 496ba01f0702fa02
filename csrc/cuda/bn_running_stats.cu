// One launch for the norms of a block: a row of blocks for each.
#include "launch.h"
#include "plan.h"

namespace fusedres::cuda {

__global__ void bn_running_stats_kernel(BnRunningStats args) {
  const BnRunningStats::Norm& norm = args.norms[blockIdx.y];
  const int64_t channel = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel == 0 && norm.counter != nullptr) ++*norm.counter;
  if (channel >= norm.channels) return;
  norm.running_mean[channel] = fmaf(norm.weight, norm.mean[channel], norm.keep * norm.running_mean[channel]);
  norm.running_var[channel] = fmaf(norm.unbiased, norm.var[channel], norm.keep * norm.running_var[channel]);
}

cudaError_t bn_running_stats(const BnRunningStats& args, cudaStream_t stream) {
  if (args.count == 0) return cudaSuccess;
  int64_t channels = 1;  // for a counter there may be without any
  for (int i = 0; i < args.count; ++i) channels = channels < args.norms[i].channels ? args.norms[i].channels : channels;
  constexpr int threads = 128;
  const dim3 blocks(unsigned(ceil_div(channels, threads)), unsigned(args.count));
  return launch(bn_running_stats_kernel, blocks, dim3(threads), stream, args);
}

}  // namespace fusedres::cuda
