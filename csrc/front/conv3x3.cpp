// 3x3 convolutions without stride by Winograd's algorithm: each op checks its arguments, allocates its results and
// calls the CPU's launcher. No other device has one.
#include <tuple>

#include "conv_checks.h"
#include "device_ops.h"
#include "devices.h"

namespace fusedres::front {

namespace {

// The sizes of a call with images t, of which the weight's dimension `summed` has the channels.
template <class Device>
Conv3x3 check_3x3(const char* op, const char* name, const Tensor& t, const Tensor& weight, int64_t summed,
                  int64_t tile) {
  const Shape shape = check_activation<Device>(op, name, t);
  if (shape.dtype != Dtype::kFloat32) {
    fail(op, name, dtype_name(t.scalar_type()), "float32", "convert it, or use backend='reference'");
  }
  check_device(op, "weight", weight, Device::kCuda);
  check_channels_last(op, "weight", weight);
  if (weight.scalar_type() != t.scalar_type()) {
    fail(op, "weight", dtype_name(weight.scalar_type()), "float32", "pass tensors of one dtype");
  }
  if (weight.size(summed) != shape.channels || weight.size(2) != 3 || weight.size(3) != 3) {
    const std::string channels = std::to_string(shape.channels);
    fail(op, "weight", sizes_of(weight),
         summed == 0 ? "[" + channels + ", Cin, 3, 3]" : "[Cout, " + channels + ", 3, 3]",
         "pass the weight of the 3x3 convolution");
  }
  if (tile != 2 && tile != 4) fail(op, "tile", std::to_string(tile), "2 or 4", "choose one of the two algorithms");
  return {t.size(0), t.size(2), t.size(3), weight.size(1), weight.size(0), tile};
}

void check_prologue(const char* op, const OptionalTensor& in_scale, const OptionalTensor& in_shift, int64_t channels) {
  check_together(op, "in_scale, in_shift", in_scale.has_value(), in_shift.has_value());
  check_vector(op, "in_scale", in_scale, channels);
  check_vector(op, "in_shift", in_shift, channels);
}

// y, mask, mean, var, finite
using Conv3x3Output = std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor, bool>;

// x [N, Cin, H, W], weight [Cout, Cin, 3, 3], residual and y [N, Cout, H, W]. out: what y is written into, or nothing.
template <class Device>
Conv3x3Output forward_3x3(const char* op, Tensor x, Tensor weight, OptionalTensor in_scale, OptionalTensor in_shift,
                          OptionalTensor scale, OptionalTensor shift, OptionalTensor residual,
                          OptionalTensor residual_scale, OptionalTensor residual_shift, bool relu, bool save_stats,
                          int64_t tile, OptionalTensor out) {
  const Conv3x3 sizes = check_3x3<Device>(op, "x", x, weight, 1, tile);
  check_prologue(op, in_scale, in_shift, sizes.in_channels);
  check_together(op, "scale, shift", scale.has_value(), shift.has_value());
  check_together(op, "residual_scale, residual_shift", residual_scale.has_value(), residual_shift.has_value());
  if (residual && !scale) fail(op, "residual", "without scale and shift", "all three", "pass BN's vectors");
  if (residual_scale && !residual) fail(op, "residual_scale", "without residual", "both", "pass the residual");
  for (const auto& [name, v] :
       {std::pair("scale", scale), std::pair("shift", shift), std::pair("residual_scale", residual_scale),
        std::pair("residual_shift", residual_shift)}) {
    check_vector(op, name, v, sizes.out_channels);
  }
  if (save_stats && scale) fail(op, "save_stats", "given with an epilogue", "one of the two", "ask for one of them");
  Tensor y = given_or_new(op, {"y", out}, x, {sizes.batch, sizes.out_channels, sizes.height, sizes.width},
                          {Named("x", x), Named("weight", weight), Named("residual", residual)});
  check_like(op, "residual", residual, y);
  OptionalTensor mean, var;
  if (save_stats) {
    mean = new_vector(x, sizes.out_channels);
    var = new_vector(x, sizes.out_channels);
  }
  const Device on(op, x);
  const bool finite = on.launch(Conv3x3Forward{sizes, data(x), data(weight), data(in_scale), data(in_shift),
                                               data(scale), data(shift), data(residual), data(residual_scale),
                                               data(residual_shift), relu, written(y), written(mean), written(var)});
  return {y, OptionalTensor(), mean, var, finite};
}

template <class Device>
Conv3x3Output conv3x3_forward(Tensor x, Tensor weight, OptionalTensor in_scale, OptionalTensor in_shift,
                              OptionalTensor scale, OptionalTensor shift, OptionalTensor residual,
                              OptionalTensor residual_scale, OptionalTensor residual_shift, bool relu, bool save_stats,
                              int64_t tile, int64_t stride, bool save_mask) {
  const char* op = "conv3x3_forward";
  if (stride != 1 || save_mask) {
    fail(op, "the call", "one with a stride or a mask", "neither", "use backend='reference'");
  }
  return forward_3x3<Device>(op, x, weight, in_scale, in_shift, scale, shift, residual, residual_scale, residual_shift,
                             relu, save_stats, tile, {});
}

// The same, into y: mean, var, finite.
template <class Device>
std::tuple<OptionalTensor, OptionalTensor, bool> conv3x3_forward_out(Tensor x, Tensor weight, OptionalTensor in_scale,
                                                                     OptionalTensor in_shift, OptionalTensor scale,
                                                                     OptionalTensor shift, OptionalTensor residual,
                                                                     OptionalTensor residual_scale,
                                                                     OptionalTensor residual_shift, bool relu,
                                                                     bool save_stats, int64_t tile, Tensor y) {
  const auto [result, mask, mean, var, finite] =
      forward_3x3<Device>("conv3x3_forward_out", x, weight, in_scale, in_shift, scale, shift, residual, residual_scale,
                          residual_shift, relu, save_stats, tile, y);
  return {mean, var, finite};
}

// dy [N, Cout, H, W], weight [Cout, Cin, 3, 3], shortcut_dy and dx [N, Cin, H, W]. out: what dx is written into, or
// nothing. Returns dx and whether it is finite.
template <class Device>
std::pair<Tensor, bool> backward_input_3x3(const char* op, const Tensor& dy, const Tensor& weight,
                                           const OptionalTensor& shortcut_dy, const OptionalTensor& mask, int64_t tile,
                                           const OptionalTensor& out) {
  const Conv3x3 sizes = check_3x3<Device>(op, "dy", dy, weight, 0, tile);
  Tensor dx = given_or_new(op, {"dx", out}, dy, {sizes.batch, sizes.in_channels, sizes.height, sizes.width},
                           {Named("dy", dy), Named("weight", weight), Named("shortcut_dy", shortcut_dy)});
  check_like(op, "shortcut_dy", shortcut_dy, dx);
  if (mask && !shortcut_dy) fail(op, "shortcut_mask", "without shortcut_dy", "both or no mask", "pass the pair");
  check_mask(op, mask, dx);
  if (mask && sizes.in_channels % 8 != 0) {
    fail(op, "shortcut_mask", std::to_string(sizes.in_channels) + " bits a position", "a multiple of 8",
         "use backend='reference'");
  }
  const Device on(op, dy);
  const bool finite =
      on.launch(Conv3x3BackwardInput{sizes, data(dy), data(weight), data(shortcut_dy), byte_data(mask), written(dx)});
  return {dx, finite};
}

template <class Device>
std::tuple<Tensor, OptionalTensor, bool> conv3x3_backward_input(Tensor dy, Tensor weight, OptionalTensor shortcut_dy,
                                                                OptionalTensor mask, int64_t tile, OptionalTensor c,
                                                                OptionalTensor scale, OptionalTensor shift,
                                                                OptionalTensor a, OptionalTensor b, OptionalTensor k,
                                                                bool relu) {
  const char* op = "conv3x3_backward_input";
  if (c || scale || shift || a || b || k || relu) {
    fail(op, "the call", "one with BN's backward", "the convolution alone", "use backend='reference'");
  }
  const auto [dx, finite] = backward_input_3x3<Device>(op, dy, weight, shortcut_dy, mask, tile, {});
  return {dx, OptionalTensor(), finite};
}

// The same, into dx: whether it is finite.
template <class Device>
bool conv3x3_backward_input_out(Tensor dy, Tensor weight, OptionalTensor shortcut_dy, OptionalTensor mask, int64_t tile,
                                Tensor dx) {
  return backward_input_3x3<Device>("conv3x3_backward_input_out", dy, weight, shortcut_dy, mask, tile, dx).second;
}

// dy [N, Cout, H, W], x [N, Cin, H, W] -> [Cout, Cin, 3, 3], channels_last
template <class Device>
std::tuple<Tensor, bool> conv3x3_backward_weight(Tensor dy, Tensor x, OptionalTensor in_scale, OptionalTensor in_shift,
                                                 int64_t tile) {
  const char* op = "conv3x3_backward_weight";
  const Shape shape = check_activation<Device>(op, "x", x);
  const int64_t out_channels = check_activation<Device>(op, "dy", dy).channels;
  Tensor dw = new_channels_last(x, out_channels, shape.channels, 3, 3, aoti_torch_dtype_float32());
  const Conv3x3 sizes = check_3x3<Device>(op, "x", x, dw, 1, tile);
  if (dy.scalar_type() != x.scalar_type() || dy.size(0) != x.size(0) || dy.size(2) != x.size(2) ||
      dy.size(3) != x.size(3)) {
    fail(op, "dy", sizes_of(dy) + " of " + dtype_name(dy.scalar_type()),
         "the images of x " + sizes_of(x) + " in float32", "pass the gradient of the convolution's output");
  }
  check_prologue(op, in_scale, in_shift, sizes.in_channels);
  const Device on(op, x);
  const bool finite =
      on.launch(Conv3x3BackwardWeight{sizes, data(dy), data(x), data(in_scale), data(in_shift), written(dw)});
  return {dw, finite};
}

}  // namespace

}  // namespace fusedres::front

FUSEDRES_OPS(CPU, m) {
  using namespace fusedres::front;
  m.impl<&conv3x3_forward<Cpu>>("conv3x3_forward");
  m.impl<&conv3x3_forward_out<Cpu>>("conv3x3_forward_out");
  m.impl<&conv3x3_backward_input<Cpu>>("conv3x3_backward_input");
  m.impl<&conv3x3_backward_input_out<Cpu>>("conv3x3_backward_input_out");
  m.impl<&conv3x3_backward_weight<Cpu>>("conv3x3_backward_weight");
}
