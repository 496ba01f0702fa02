#include "bn_math.h"
#include "launch.h"

namespace fusedres::cuda {

__global__ void bn_scale_shift_kernel(BnScaleShift args) {
  const int64_t channel = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel < args.channels) scale_shift_of_channel(args, channel, args.mean[channel], args.var[channel]);
}

cudaError_t bn_scale_shift(const BnScaleShift& args, cudaStream_t stream) {
  if (args.channels == 0) return cudaSuccess;
  constexpr int threads = 128;
  return launch(bn_scale_shift_kernel, dim3(unsigned(ceil_div(args.channels, threads))), dim3(threads), stream, args);
}

}  // namespace fusedres::cuda
