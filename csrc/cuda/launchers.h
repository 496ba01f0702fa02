// The CUDA kernels' interface: torch-free, one launcher an op. Maths: fusedres/ops/contract/.
//
// Activations are NHWC: rows x channels, rows = N*H*W, dense, any alignment (16 bytes is the fast one).
// Channel vectors are float32 [C]. All pointers are device pointers; outputs overlap nothing. Every launcher
// only enqueues on `stream` of the current device: no synchronisation, no allocation, safe in graph capture.
// The result is cudaSuccess, or what the launch returned; cudaErrorInvalidValue for arguments a kernel
// does not take.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "plan.h"

namespace fusedres::cuda {

enum class Dtype : int {
  kFloat16 = 0,
  kBFloat16 = 1,
  kFloat32 = 2,
  kFloat64 = 3
};  // float64: parameters only

struct Shape {
  Dtype dtype;
  int64_t rows;      // P = N*H*W
  int64_t channels;  // C
};

// Scratch of a reducing op, 16-byte aligned, for one launch at a time. Its first bytes are counters, which
// every launch leaves at zero: who keeps a workspace for later launches of the same op and shape on the same
// stream says so and saves the memset.
struct Workspace {
  void* data;
  size_t bytes;
  bool counters_are_zero;
};

struct Parameter {
  const void* data;  // [C], or null: 1 for a weight, 0 for a bias
  Dtype dtype;
};

// ------------------------------------------------------------------------------------------ channel vectors

struct BnScaleShift {
  int64_t channels;
  const float* mean;  // [C]
  const float* var;   // [C] biased
  Parameter weight;
  Parameter bias;
  double eps;
  float* invstd;  // [C] (var + eps)^-1/2
  float* scale;   // [C] weight * invstd
  float* shift;   // [C] bias - mean*scale
};
cudaError_t bn_scale_shift(const BnScaleShift& args, cudaStream_t stream);

struct BnBackwardCoefficients {
  int64_t channels;
  int64_t rows;
  const float* sum_dz;           // [C]
  const float* sum_dz_centered;  // [C]
  const float* mean;             // [C] this and the next two: the forward's vectors
  const float* invstd;           // [C]
  const float* scale;            // [C]
  float* dweight;                // [C]
  float* B;                      // [C], null with K: frozen statistics
  float* K;                      // [C]
};
cudaError_t bn_backward_coefficients(const BnBackwardCoefficients& args, cudaStream_t stream);

// ------------------------------------------------------------------------------------------ batch
// normalisation

struct BnStats {
  Shape shape;
  const void* c;  // [P, C]
  float* mean;    // [C]
  float* var;     // [C] biased
  // computed by the last block of the same launch if .scale is set; .channels, .mean, .var are not looked at
  BnScaleShift scale_shift;
};
size_t bn_stats_workspace(const Shape& shape);
cudaError_t bn_stats(const BnStats& args, const Workspace& workspace, cudaStream_t stream);

struct BnAddReluForward {
  Shape shape;
  const void* c;                // [P, C]
  const float* scale;           // [C]
  const float* shift;           // [C]
  const void* residual;         // [P, C] or null
  const float* residual_scale;  // [C], null with residual_shift: the residual as it is
  const float* residual_shift;  // [C]
  bool relu;
  void* y;        // [P, C]
  uint8_t* mask;  // [ceil(P*C / 8)] or null
};
cudaError_t bn_add_relu_forward(const BnAddReluForward& args, cudaStream_t stream);

// dz = dy where `mask` has a bit; without a mask, if `relu`, where round(scale*c + shift) > 0; else dy
// itself.
struct BnAddReluBackwardReduce {
  Shape shape;
  const void* dy;       // [P, C]
  const void* c;        // [P, C]
  const uint8_t* mask;  // [ceil(P*C / 8)] or null
  bool relu;
  const float* mean;           // [C]
  const float* scale;          // [C], read if the sign of scale*c + shift is the mask
  const float* shift;          // [C]
  const void* shortcut_c;      // [P, C], with shortcut_sum
  const float* shortcut_mean;  // [C], with shortcut_sum
  float* sum_dz;               // [C]
  float* sum_dz_centered;      // [C] sum dz*(c - mean)
  float* shortcut_sum;         // [C] sum dz*(shortcut_c - shortcut_mean), or null: no projection
  // computed by the last block of the same launch if .dweight is set; .channels and the sums are not looked
  // at
  BnBackwardCoefficients coefficients;
  BnBackwardCoefficients shortcut_coefficients;
};
size_t bn_add_relu_backward_reduce_workspace(const Shape& shape);
cudaError_t bn_add_relu_backward_reduce(const BnAddReluBackwardReduce& args, const Workspace& workspace,
                                        cudaStream_t stream);

struct Coefficients {
  const float* A;  // [C] dc = A*dz + B*c + K
  const float* B;  // [C], null with K: dc = A*dz
  const float* K;  // [C]
};

struct BnAddReluBackwardInput {
  Shape shape;
  const void* dy;       // [P, C]
  const void* c;        // [P, C]
  const uint8_t* mask;  // as in BnAddReluBackwardReduce, like the next three
  bool relu;
  const float* scale;  // [C]
  const float* shift;  // [C]
  Coefficients grads;
  const void* shortcut_c;       // [P, C] or null
  Coefficients shortcut_grads;  // with shortcut_c
  void* dc;                     // [P, C]
  void* dresidual;              // [P, C]: the projection's gradient with shortcut_c, dz without; null: none
};
cudaError_t bn_add_relu_backward_input(const BnAddReluBackwardInput& args, cudaStream_t stream);

struct ReluBackward {
  Dtype dtype;
  int64_t numel;
  const void* dy;       // [numel]
  const uint8_t* mask;  // [ceil(numel / 8)]
  void* dz;             // [numel] dy where the mask has a bit, else 0
};
cudaError_t relu_backward(const ReluBackward& args, cudaStream_t stream);

// ------------------------------------------------------------------------------------------ stem

struct Pooling {
  Dtype dtype;
  int64_t batch, height, width, channels;  // of c; P = batch*height*width
  int kernel_size = 1, stride = 1, padding = 0;  // square, kernel_size <= 15, padding <= kernel_size / 2

  // divided once, on the host: a kernel would divide 64-bit numbers for every row
  int64_t pooled_height = pooled(height);
  int64_t pooled_width = pooled(width);

  constexpr int64_t pooled(int64_t size) const {
    return stride > 0 ? (size + 2 * padding - kernel_size) / stride + 1 : 0;
  }
};

struct BnReluMaxpoolForward {
  Pooling pooling;
  const void* c;       // [N, H, W, C]
  const float* scale;  // [C]
  const float* shift;  // [C]
  void* y;             // [N, H', W', C]
  uint8_t* indices;    // [N, H', W', C]: kh*kernel_size + kw of the first maximum, 255 where y <= 0
};
cudaError_t bn_relu_maxpool_forward(const BnReluMaxpoolForward& args, cudaStream_t stream);

struct BnReluMaxpoolBackwardReduce {
  Pooling pooling;
  const void* dy;                       // [N, H', W', C]
  const uint8_t* indices;               // [N, H', W', C]
  const void* c;                        // [N, H, W, C]
  const float* mean;                    // [C]
  float* sum_dz;                        // [C]
  float* sum_dz_centered;               // [C]
  BnBackwardCoefficients coefficients;  // as in BnAddReluBackwardReduce
};
size_t bn_relu_maxpool_backward_reduce_workspace(const Pooling& pooling);
cudaError_t bn_relu_maxpool_backward_reduce(const BnReluMaxpoolBackwardReduce& args,
                                            const Workspace& workspace, cudaStream_t stream);

struct BnReluMaxpoolBackwardInput {
  Pooling pooling;
  const void* dy;          // [N, H', W', C]
  const uint8_t* indices;  // [N, H', W', C]
  const void* c;           // [N, H, W, C]
  Coefficients grads;
  void* dc;  // [N, H, W, C]
};
cudaError_t bn_relu_maxpool_backward_input(const BnReluMaxpoolBackwardInput& args, cudaStream_t stream);

}  // namespace fusedres::cuda
