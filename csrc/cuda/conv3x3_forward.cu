#include "conv_forward.h"

namespace fusedres::cuda {

cudaError_t conv3x3_forward(const ConvForward& args, const Workspace& workspace, cudaStream_t stream) {
  return launch_conv_forward<3>(args, workspace, stream);
}

}  // namespace fusedres::cuda
