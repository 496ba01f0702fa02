#include "conv_forward.h"

namespace fusedres::cuda {

size_t conv_forward_workspace(const ConvForward& args) {
  DeviceLimits limits;
  if (args.mean == nullptr || current_device_limits(&limits) != cudaSuccess) return 0;
  return plan_product(args.rows, args.out_channels, args.in_channels, limits).workspace_bytes();
}

cudaError_t conv1x1_forward(const ConvForward& args, Workspace& workspace, cudaStream_t stream) {
  return launch_implicit_product<1>(args, workspace, stream);
}

}  // namespace fusedres::cuda
