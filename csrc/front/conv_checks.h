// Checks of arguments that the ops of convolutions share.
#pragma once

#include "results.h"

namespace fusedres::front {

// Checks x, and the weight [Cout, Cin, kernel, kernel] of a convolution that sums over x's channels: they are the
// weight's dimension `summed`.
template <class Device>
Shape check_weight(const char* op, const char* name, const Tensor& x, const Tensor& weight, int64_t summed,
                   int64_t kernel) {
  const Shape shape = check_activation<Device>(op, name, x);
  check_same_dtype(op, "weight", weight, x);
  check_channels_last(op, "weight", weight);
  check_device(op, "weight", weight, Device::kCuda);
  const std::string channels = std::to_string(shape.channels);
  if (weight.size(summed) != shape.channels || weight.size(2) != kernel || weight.size(3) != kernel) {
    const std::string side = std::to_string(kernel), window = ", " + side + ", " + side + "]";
    fail(op, "weight", sizes_of(weight), (summed == 0 ? "[" + channels + ", Cin" : "[Cout, " + channels) + window,
         "pass the weight of this convolution");
  }
  Device::check_convolutions(op, name, x);
  if (!Device::kCuda && shape.dtype != Dtype::kFloat32 && shape.channels % 2 != 0) {
    fail(op, name, channels + " channels", "an even number", "use backend='reference'");
  }
  return shape;
}

template <class Device>
Shape check_1x1(const char* op, const char* name, const Tensor& x, const Tensor& weight, int64_t summed) {
  return check_weight<Device>(op, name, x, weight, summed, 1);
}

// Two vectors [channels], which are given together.
struct VectorPair {
  const char *both, *scale_name, *shift_name;
  const OptionalTensor scale, shift;

  void check(const char* op, int64_t channels) const {
    check_together(op, both, scale.has_value(), shift.has_value());
    check_vector(op, scale_name, scale, channels);
    check_vector(op, shift_name, shift, channels);
  }
};

}  // namespace fusedres::front
