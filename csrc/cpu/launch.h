// From whole tensors to kernel calls: splits rows over threads, repeats channel vectors to the period, merges
// sums. Plain pointers to dense NHWC tensors of `rows` x `channels`; vectors are float [channels].
#pragma once

#include "kernels.h"

namespace fusedres::cpu {

struct Shape {
  Dtype dtype;
  int64_t rows;      // P = N*H*W
  int64_t channels;  // C
};

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

struct Affine {
  const float *scale, *shift;  // null: absent
};

struct Gradients {
  const void* dy;
  const void* c;
  const uint8_t* mask;  // null: none
  bool relu;            // without a mask: take the sign of scale*c + shift
  Affine affine;
};

void launch_bn_stats(const Shape& shape, const void* c, float* mean, float* var);

void launch_bn_add_relu_forward(const Shape& shape, const void* c, Affine affine, const void* residual,
                                Affine residual_affine, bool relu, void* y, uint8_t* mask);

// sum_shortcut null: no shortcut
void launch_bn_add_relu_backward_reduce(const Shape& shape, const Gradients& gradients, const float* mean,
                                        const void* shortcut_c, const float* shortcut_mean, float* sum_dz,
                                        float* sum_centered, float* sum_shortcut);

void launch_bn_add_relu_backward_input(const Shape& shape, const Gradients& gradients, Coefficients main,
                                       const void* shortcut_c, Coefficients shortcut, void* dc, void* dresidual);

void launch_relu_backward(const Shape& shape, const void* dy, const uint8_t* mask, void* dz);

void launch_bn_relu_maxpool_forward(Dtype dtype, int64_t batch, const Window& window, const void* c, Affine affine,
                                    void* y, uint8_t* indices);

void launch_bn_relu_maxpool_backward_reduce(Dtype dtype, int64_t batch, const Window& window, const void* dy,
                                            const uint8_t* indices, const void* c, const float* mean,
                                            float* sum_dz, float* sum_centered);

void launch_bn_relu_maxpool_backward_input(Dtype dtype, int64_t batch, const Window& window, const void* dy,
                                           const uint8_t* indices, const void* c, Coefficients main, void* dc);

// dw is written; `piece`, the scratch and the input channels are chosen here
void launch_conv_backward_weight(ConvWeightArgs args);

// `weight` [out_channels, in_channels] is packed here
void launch_conv_backward_input(Conv1x1InputArgs args, const void* weight);
void launch_conv1x1_forward(Conv1x1Args args, int64_t positions, const void* weight);

}  // namespace fusedres::cpu
