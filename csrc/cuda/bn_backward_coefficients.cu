#include "bn_math.h"
#include "launch.h"

namespace fusedres::cuda {

__global__ void bn_backward_coefficients_kernel(BnBackwardCoefficients args) {
  const int64_t channel = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel < args.channels)
    coefficients_of_channel(args, channel, args.sum_dz[channel], args.sum_dz_centered[channel]);
}

cudaError_t bn_backward_coefficients(const BnBackwardCoefficients& args, cudaStream_t stream) {
  if (args.channels == 0) return cudaSuccess;
  constexpr int threads = 128;
  return launch(bn_backward_coefficients_kernel, dim3(unsigned(ceil_div(args.channels, threads))), dim3(threads),
                stream, args);
}

}  // namespace fusedres::cuda
