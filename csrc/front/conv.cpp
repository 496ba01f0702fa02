// Convolutions: each op checks its arguments, allocates its results and calls the device's launcher.
#include <tuple>

#include "allocate.h"
#include "conv_forward.h"
#include "device_ops.h"
#include "devices.h"

namespace fusedres::front {

namespace {

// One axis, 2 or 3, of a convolution from x to dy's shape, checked.
ConvAxis axis_of(const char* op, const Tensor& dy, const Tensor& x, int64_t kernel, int64_t stride, int64_t padding,
                 int64_t dilation, int64_t axis) {
  constexpr int64_t kLargest = 1 << 20;  // the product of two, with an image's size added, stays far from 2^63
  const auto within = [](int64_t least, int64_t value) { return value >= least && value <= kLargest; };
  if (!within(1, kernel) || !within(1, stride) || !within(0, padding) || !within(1, dilation)) {
    std::ostringstream found;
    found << "kernel " << kernel << ", stride " << stride << ", padding " << padding << ", dilation " << dilation;
    fail(op, "the convolution", found.str(), "kernel, stride, dilation >= 1 and padding >= 0, none above 2^20",
         "pass its geometry");
  }
  const int64_t in = x.size(axis), out = dy.size(axis);
  const int64_t room = in + 2 * padding - dilation * (kernel - 1) - 1;
  const int64_t expected = room < 0 ? 0 : room / stride + 1;
  if (dy.size(0) != x.size(0) || out != expected) {
    fail(op, "dy", sizes_of(dy),
         "the output's shape, " + std::to_string(expected) + " along dimension " + std::to_string(axis) + " for x " +
             sizes_of(x),
         "pass the gradient of the convolution's output");
  }
  return {in, out, kernel, stride, padding, dilation};
}

// dy [N, Cout, H', W'], x [N, Cin, H, W] -> [Cout, Cin, kernel_height, kernel_width] in float32, channels_last
template <class Device>
Tensor conv_backward_weight(Tensor dy, Tensor x, int64_t kernel_height, int64_t kernel_width, int64_t stride_height,
                            int64_t stride_width, int64_t padding_height, int64_t padding_width,
                            int64_t dilation_height, int64_t dilation_width) {
  const char* op = "conv_backward_weight";
  const int64_t out_channels = check_activation<Device>(op, "dy", dy).channels;
  const Shape shape = check_activation<Device>(op, "x", x);
  check_same_dtype(op, "dy", dy, x);
  Device::check_convolutions(op, "x", x);
  const ConvAxis height = axis_of(op, dy, x, kernel_height, stride_height, padding_height, dilation_height, 2);
  const ConvAxis width = axis_of(op, dy, x, kernel_width, stride_width, padding_width, dilation_width, 3);
  const Device on(op, x, {Named("dy", dy)});
  Tensor dw =
      new_channels_last(x, out_channels, shape.channels, kernel_height, kernel_width, aoti_torch_dtype_float32());
  on.launch(ConvBackwardWeight{shape.dtype, x.size(0), shape.channels, out_channels, height, width, dy.const_data_ptr(),
                               x.const_data_ptr(), written(dw)});
  return dw;
}

// dy [N, Cout, H, W], weight [Cout, Cin, 1, 1], shortcut_dy and dx [N, Cin, H, W]; out: the tensor to write dx into, or
// none
template <class Device>
Tensor backward_input(const char* op, const Tensor& dy, const Tensor& weight, const OptionalTensor& shortcut_dy,
                      const OptionalTensor& mask, const OptionalTensor& out) {
  const Shape shape = check_1x1<Device>(op, "dy", dy, weight, 0);
  const int64_t batch = dy.size(0), channels = weight.size(1), height = dy.size(2), width = dy.size(3);
  Tensor dx = given_or_new(op, {"dx", out}, dy, {batch, channels, height, width},
                           {Named("dy", dy), Named("weight", weight), Named("shortcut_dy", shortcut_dy)});
  check_like(op, "shortcut_dy", shortcut_dy, dx);
  if (mask && !shortcut_dy) fail(op, "shortcut_mask", "without shortcut_dy", "both or no mask", "pass the pair");
  check_mask(op, mask, dx);
  if (mask && channels % 8 != 0) {
    fail(op, "shortcut_mask", std::to_string(channels) + " bits a position", "a multiple of 8",
         "use backend='reference'");
  }
  const Device on(op, dy, {Named("weight", weight), Named("shortcut_dy", shortcut_dy), Named("shortcut_mask", mask)});
  const ConvAxis down{height, height, 1, 1, 0, 1}, across{width, width, 1, 1, 0, 1};
  on.launch(ConvBackwardInput{shape.dtype, batch, channels, shape.channels, down, across, dy.const_data_ptr(),
                              weight.const_data_ptr(), untyped(shortcut_dy), byte_data(mask), dx.mutable_data_ptr(),
                              out.has_value()});
  return dx;
}

template <class Device>
Tensor conv_backward_input(Tensor dy, Tensor weight, OptionalTensor shortcut_dy, OptionalTensor mask) {
  return backward_input<Device>("conv_backward_input", dy, weight, shortcut_dy, mask, {});
}

// The same, on the CPU, into dx.
template <class Device>
void conv_backward_input_out(Tensor dy, Tensor weight, OptionalTensor shortcut_dy, OptionalTensor mask, Tensor dx) {
  backward_input<Device>("conv_backward_input_out", dy, weight, shortcut_dy, mask, dx);
}

// Adds to dx [N, Cin, H, W]; dy [N, Cout, H', W'], weight [Cout, Cin, 1, 1].
template <class Device>
void conv_backward_input_(Tensor dx, Tensor dy, Tensor weight, int64_t stride_height, int64_t stride_width) {
  const char* op = "conv_backward_input_";
  const Shape shape = check_1x1<Device>(op, "dy", dy, weight, 0);
  const int64_t channels = check_activation<Device>(op, "dx", dx).channels;
  check_same_dtype(op, "dx", dx, dy);
  if (channels != weight.size(1)) {
    fail(op, "dx", sizes_of(dx), std::to_string(weight.size(1)) + " channels", "pass the input's gradient");
  }
  const ConvAxis height = axis_of(op, dy, dx, 1, stride_height, 0, 1, 2);
  const ConvAxis width = axis_of(op, dy, dx, 1, stride_width, 0, 1, 3);
  const Device on(op, dy, {Named("dx", dx), Named("weight", weight)});
  on.launch(ConvBackwardInput{shape.dtype, dy.size(0), channels, shape.channels, height, width, dy.const_data_ptr(),
                              weight.const_data_ptr(), dx.const_data_ptr(), nullptr, dx.mutable_data_ptr()});
}

// x [N, Cin, H, W], weight [Cout, Cin, 1, 1], residual and y [N, Cout, H', W']
template <class Device>
ConvOutput conv1x1_forward(Tensor x, Tensor weight, OptionalTensor bias, int64_t stride, OptionalTensor in_scale,
                           OptionalTensor in_shift, OptionalTensor scale, OptionalTensor shift, OptionalTensor residual,
                           OptionalTensor residual_scale, OptionalTensor residual_shift, bool relu, bool save_mask,
                           bool save_stats) {
  const char* op = "conv1x1_forward";
  Device::check_form(op, !bias && !in_scale && !save_mask && !save_stats && (scale || (!residual && !relu)));
  return conv_forward<Device>(op, 1, x, weight, bias, stride, in_scale, in_shift, scale, shift, residual,
                              residual_scale, residual_shift, relu, save_mask, save_stats);
}

// The same, on the CPU, into y.
template <class Device>
void conv1x1_forward_out(Tensor x, Tensor weight, int64_t stride, OptionalTensor scale, OptionalTensor shift,
                         OptionalTensor residual, OptionalTensor residual_scale, OptionalTensor residual_shift,
                         bool relu, Tensor y) {
  const char* op = "conv1x1_forward_out";
  Device::check_form(op, scale || (!residual && !relu));
  conv_forward<Device>(op, 1, x, weight, {}, stride, {}, {}, scale, shift, residual, residual_scale, residual_shift,
                       relu, false, false, y);
}

}  // namespace

}  // namespace fusedres::front

FUSEDRES_OPS(CPU, m) {
  using namespace fusedres::front;
  m.impl<&conv_backward_weight<Cpu>>("conv_backward_weight");
  m.impl<&conv1x1_forward<Cpu>>("conv1x1_forward");
  m.impl<&conv1x1_forward_out<Cpu>>("conv1x1_forward_out");
  m.impl<&conv_backward_input<Cpu>>("conv_backward_input");
  m.impl<&conv_backward_input_out<Cpu>>("conv_backward_input_out");
  m.impl<&conv_backward_input_<Cpu>>("conv_backward_input_");
}
#ifdef USE_CUDA
FUSEDRES_OPS(CUDA, m) {
  using namespace fusedres::front;
  m.impl<&conv1x1_forward<Cuda>>("conv1x1_forward");
}
#endif
