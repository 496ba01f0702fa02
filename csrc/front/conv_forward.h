// The forward of a convolution, without groups and dilation, with what is fused to it: arguments checked, results
// allocated, the device's launcher called.
#pragma once

#include <tuple>

#include "allocate.h"
#include "conv_checks.h"

namespace fusedres::front {

// y, mask, mean, var
using ConvOutput = std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor>;

// One axis of a convolution whose padding keeps the size where the stride is 1.
inline ConvAxis strided(int64_t in, int64_t kernel, int64_t stride) {
  return {in, in == 0 ? 0 : (in - 1) / stride + 1, kernel, stride, kernel / 2, 1};
}

// The op of a window of this side: x [N, Cin, H, W], weight [Cout, Cin, kernel, kernel], residual and
// y [N, Cout, H', W']; out: the tensor to write y into, or none
template <class Device>
ConvOutput conv_forward(const char* op, int64_t kernel, Tensor x, Tensor weight, OptionalTensor bias, int64_t stride,
                        OptionalTensor in_scale, OptionalTensor in_shift, OptionalTensor scale, OptionalTensor shift,
                        OptionalTensor residual, OptionalTensor residual_scale, OptionalTensor residual_shift,
                        bool relu, bool save_mask, bool save_stats, OptionalTensor out = {}) {
  const Shape shape = check_weight<Device>(op, "x", x, weight, 1, kernel);
  const int64_t channels = weight.size(0);
  if (stride < 1 || stride > 1 << 20) {
    fail(op, "stride", std::to_string(stride), "from 1 to 2^20", "pass its geometry");
  }
  if (bias) {
    check_same_dtype(op, "bias", *bias, x);
    if (bias->dim() != 1 || bias->size(0) != channels || !bias->is_contiguous()) {
      fail(op, "bias", layout_of(*bias), "contiguous [" + std::to_string(channels) + "]", "pass one value a channel");
    }
  }
  VectorPair{"in_scale, in_shift", "in_scale", "in_shift", in_scale, in_shift}.check(op, shape.channels);
  VectorPair{"scale, shift", "scale", "shift", scale, shift}.check(op, channels);
  VectorPair{"residual_scale, residual_shift", "residual_scale", "residual_shift", residual_scale, residual_shift}
      .check(op, channels);
  if (residual_scale && !residual) fail(op, "residual_scale", "without residual", "both", "pass the residual");
  const Device on(
      op, x,
      {Named("weight", weight), Named("bias", bias), Named("in_scale", in_scale), Named("in_shift", in_shift),
       Named("scale", scale), Named("shift", shift), Named("residual", residual),
       Named("residual_scale", residual_scale), Named("residual_shift", residual_shift)});
  const ConvAxis height = strided(x.size(2), kernel, stride), width = strided(x.size(3), kernel, stride);
  const int64_t rows = x.size(0) * height.out * width.out;
  Tensor y = given_or_new(op, {"y", out}, x, {x.size(0), channels, height.out, width.out},
                          {Named("x", x), Named("weight", weight), Named("residual", residual)});
  check_like(op, "residual", residual, y);
  OptionalTensor mask, mean, var;
  if (save_mask) mask = new_bytes(x, (rows * channels + 7) / 8);
  if (save_stats) {
    mean = new_vector(x, channels);
    var = new_vector(x, channels);
  }
  const ConvForward call{shape.dtype,
                         rows,
                         shape.channels,
                         channels,
                         x.const_data_ptr(),
                         weight.const_data_ptr(),
                         data(scale),
                         data(shift),
                         untyped(residual),
                         data(residual_scale),
                         data(residual_shift),
                         relu,
                         y.mutable_data_ptr(),
                         height,
                         width,
                         untyped(bias),
                         data(in_scale),
                         data(in_shift),
                         written_bytes(mask),
                         written(mean),
                         written(var)};
  if constexpr (Device::kCuda) {
    on.launch(call);
  } else {
    on.launch(call, out.has_value());
  }
  return {y, mask, mean, var};
}

}  // namespace fusedres::front
