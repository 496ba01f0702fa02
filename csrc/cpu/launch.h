// The CPU's launchers, one for each op of ../ops.h: from whole tensors to kernel calls. A launcher splits rows over
// threads, repeats channel vectors to the period and merges sums. It needs a processor for which kernels() is not null.
#pragma once

#include "kernels.h"

namespace fusedres::cpu {

void bn_scale_shift(const BnScaleShift& args);
void bn_backward_coefficients(const BnBackwardCoefficients& args);
void bn_running_stats(const BnRunningStats& args);

void bn_stats(const BnStats& args);
void bn_add_relu_forward(const BnAddReluForward& args);
void bn_add_relu_backward_reduce(const BnAddReluBackwardReduce& args);
void bn_add_relu_backward_input(const BnAddReluBackwardInput& args);
void cast(const Cast& args);
void relu_backward(const ReluBackward& args);

void bn_relu_maxpool_forward(const BnReluMaxpoolForward& args);
void bn_relu_maxpool_backward_reduce(const BnReluMaxpoolBackwardReduce& args);
void bn_relu_maxpool_backward_input(const BnReluMaxpoolBackwardInput& args);

// These need a dtype for which convolutions() is not null.
void conv_backward_weight(const ConvBackwardWeight& args);
void conv_backward_input(const ConvBackwardInput& args);
// kept: whether y lies in memory that is kept between calls
void conv1x1_forward(const ConvForward& args, bool kept = false);

// These return whether every result of the convolution is finite.
bool conv3x3_forward(const Conv3x3Forward& args);
bool conv3x3_backward_input(const Conv3x3BackwardInput& args);
bool conv3x3_backward_weight(const Conv3x3BackwardWeight& args);

}  // namespace fusedres::cpu
