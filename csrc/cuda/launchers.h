// The CUDA kernels' launchers, one for each op of ../ops.h, without torch.
//
// All pointers are device pointers; 16 bytes is the fast alignment. Every launcher only enqueues on `stream` of the
// current device: no synchronisation, no allocation, safe in graph capture. The result is cudaSuccess, or what the
// launch returned; cudaErrorInvalidValue for arguments that a kernel does not take.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../ops.h"
#include "plan.h"

namespace fusedres::cuda {

// Scratch of a reducing op, 16-byte aligned, for one launch at a time. Its first bytes may be counters, which a launch
// leaves at zero; zero_bytes: how many of its first bytes are zero. A launch clears no more than it has to, and says
// what it leaves: a caller that keeps a workspace for later launches on the same stream saves their memsets.
struct Workspace {
  void* data;
  size_t bytes;
  int64_t zero_bytes;
};

cudaError_t bn_scale_shift(const BnScaleShift& args, cudaStream_t stream);
cudaError_t bn_backward_coefficients(const BnBackwardCoefficients& args, cudaStream_t stream);
cudaError_t bn_running_stats(const BnRunningStats& args, cudaStream_t stream);
cudaError_t cast(const Cast& args, cudaStream_t stream);

size_t bn_stats_workspace(const Shape& shape);
cudaError_t bn_stats(const BnStats& args, Workspace& workspace, cudaStream_t stream);
cudaError_t bn_add_relu_forward(const BnAddReluForward& args, cudaStream_t stream);
size_t bn_add_relu_backward_reduce_workspace(const Shape& shape);
cudaError_t bn_add_relu_backward_reduce(const BnAddReluBackwardReduce& args, Workspace& workspace, cudaStream_t stream);
cudaError_t bn_add_relu_backward_input(const BnAddReluBackwardInput& args, cudaStream_t stream);
cudaError_t relu_backward(const ReluBackward& args, cudaStream_t stream);

cudaError_t bn_relu_maxpool_forward(const BnReluMaxpoolForward& args, cudaStream_t stream);
size_t bn_relu_maxpool_backward_reduce_workspace(const Pooling& pooling);
cudaError_t bn_relu_maxpool_backward_reduce(const BnReluMaxpoolBackwardReduce& args, Workspace& workspace,
                                            cudaStream_t stream);
cudaError_t bn_relu_maxpool_backward_input(const BnReluMaxpoolBackwardInput& args, cudaStream_t stream);

// The products take bfloat16 and float16, on devices of compute capability 8.0 and up.
size_t conv_forward_workspace(const ConvForward& args);
cudaError_t conv1x1_forward(const ConvForward& args, Workspace& workspace, cudaStream_t stream);
cudaError_t conv3x3_forward(const ConvForward& args, Workspace& workspace, cudaStream_t stream);
cudaError_t conv3x3_backward_input(const Conv3x3BnBackwardInput& args, cudaStream_t stream);
cudaError_t conv1x1_backward_input(const Conv1x1BackwardInput& args, cudaStream_t stream);
size_t conv1x1_backward_weight_workspace(const Conv1x1BackwardWeight& args);
cudaError_t conv1x1_backward_weight(const Conv1x1BackwardWeight& args, Workspace& workspace, cudaStream_t stream);
size_t gram_workspace(const Gram& args);
cudaError_t gram(const Gram& args, Workspace& workspace, cudaStream_t stream);
size_t conv1x1_gram_backward_input_workspace(const Conv1x1GramBackwardInput& args);
cudaError_t conv1x1_gram_backward_input(const Conv1x1GramBackwardInput& args, Workspace& workspace,
                                        cudaStream_t stream);

// Products of weights and moments, in float64: for devices that have arithmetic for it.
size_t gram_output_stats_workspace(const GramOutputStats& args);
cudaError_t gram_output_stats(const GramOutputStats& args, Workspace& workspace, cudaStream_t stream);
size_t gram_backward_coefficients_workspace(const GramBackwardCoefficients& args);
cudaError_t gram_backward_coefficients(const GramBackwardCoefficients& args, Workspace& workspace, cudaStream_t stream);

}  // namespace fusedres::cuda
