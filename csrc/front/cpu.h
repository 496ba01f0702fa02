// The CPU as a device of the front: what it asks of tensors, and its launchers.
#pragma once

#include <initializer_list>

#include "../cpu/launch.h"
#include "arguments.h"

namespace fusedres::front {

struct Cpu {
  static constexpr bool kCuda = false;
  static constexpr bool kFormsIndicesAlways = false;

  // Checks nothing: torch does not dispatch an op to the CPU if one of its tensors lies elsewhere.
  Cpu(const char*, const Tensor&, std::initializer_list<Named> = {}) {}

  static void check_processor(const char* op) {
    if (cpu::kernels() != nullptr) return;
    fail(op, "this processor", "without AVX2", "AVX2 and FMA", "use backend='reference'");
  }

  static Dtype dtype_of(const char* op, const char* name, const Tensor& t) {
    switch (t.scalar_type()) {
      case ScalarType::Float: return Dtype::kFloat32;
      case ScalarType::BFloat16: return Dtype::kBFloat16;
      default:
        fail(op, name, dtype_name(t.scalar_type()), "float32 or bfloat16", "convert it, or use backend='reference'");
    }
  }

  static Parameter parameter_of(const char* op, const char* name, const OptionalTensor& v, int64_t channels) {
    check_vector(op, name, v, channels);
    return {untyped(v), Dtype::kFloat32};
  }

  // Fails where this processor has no convolutions of t's dtype.
  static void check_convolutions(const char* op, const char* name, const Tensor& t) {
    if (cpu::convolutions(dtype_of(op, name, t)) != nullptr) return;
    fail(op, name, dtype_name(t.scalar_type()), "float32 on this processor", "convert it, or use backend='reference'");
  }

  // known: whether it is a form of a convolution that there are kernels for.
  static void check_form(const char* op, bool known) {
    if (known) return;
    fail(op, "the call", "another form", "no bias, prologue, mask and statistics; residual and relu after scale alone",
         "use backend='reference'");
  }

  static void launch(const Cast& args) { cpu::cast(args); }
  static void launch(const BnScaleShift& args) { cpu::bn_scale_shift(args); }
  static void launch(const BnBackwardCoefficients& args) { cpu::bn_backward_coefficients(args); }
  static void launch(const BnRunningStats& args) { cpu::bn_running_stats(args); }
  static void launch(const BnStats& args) { cpu::bn_stats(args); }
  static void launch(const BnAddReluForward& args) { cpu::bn_add_relu_forward(args); }
  static void launch(const BnAddReluBackwardReduce& args) { cpu::bn_add_relu_backward_reduce(args); }
  static void launch(const BnAddReluBackwardInput& args) { cpu::bn_add_relu_backward_input(args); }
  static void launch(const ReluBackward& args) { cpu::relu_backward(args); }
  static void launch(const BnReluMaxpoolForward& args) { cpu::bn_relu_maxpool_forward(args); }
  static void launch(const BnReluMaxpoolBackwardReduce& args) { cpu::bn_relu_maxpool_backward_reduce(args); }
  static void launch(const BnReluMaxpoolBackwardInput& args) { cpu::bn_relu_maxpool_backward_input(args); }
  static void launch(const ConvBackwardWeight& args) { cpu::conv_backward_weight(args); }
  static void launch(const ConvBackwardInput& args) { cpu::conv_backward_input(args); }
  static void launch(const ConvForward& args, bool kept) { cpu::conv1x1_forward(args, kept); }
  static bool launch(const Conv3x3Forward& args) { return cpu::conv3x3_forward(args); }
  static bool launch(const Conv3x3BackwardInput& args) { return cpu::conv3x3_backward_input(args); }
  static bool launch(const Conv3x3BackwardWeight& args) { return cpu::conv3x3_backward_weight(args); }
  static void launch(const cpu::Grouped3x3Forward& args) { cpu::grouped_conv3x3_forward(args); }
  static void launch(const cpu::Grouped3x3BackwardInput& args) { cpu::grouped_conv3x3_backward_input(args); }
  static void launch(const cpu::Grouped3x3BackwardWeight& args) { cpu::grouped_conv3x3_backward_weight(args); }
};

}  // namespace fusedres::front
