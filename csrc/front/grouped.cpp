// Grouped 3x3 convolutions with padding 1: each op checks its arguments, allocates its results and calls the CPU's
// launcher. No other device has one.
#include "../cpu/grouped.h"

#include "allocate.h"
#include "conv_forward.h"
#include "device_ops.h"
#include "devices.h"

namespace fusedres::front {

namespace {

using cpu::Grouped3x3;

// The sizes of a convolution of x [N, C, H, W] with a weight [C, C/groups, 3, 3].
template <class Device>
Grouped3x3 check_grouped(const char* op, const Tensor& x, int64_t in_group, int64_t stride) {
  const Shape shape = check_activation<Device>(op, "x", x);
  if (shape.dtype != Dtype::kFloat32) {
    fail(op, "x", dtype_name(x.scalar_type()), "float32", "convert it, or use backend='reference'");
  }
  if (stride != 1 && stride != 2) fail(op, "stride", std::to_string(stride), "1 or 2", "use backend='reference'");
  if (in_group < 1 || shape.channels % in_group != 0 || !cpu::grouped_fits(shape.channels, in_group)) {
    fail(op, "the weight", std::to_string(in_group) + " channels a group, of " + std::to_string(shape.channels),
         "groups of a multiple of 4 that fill vectors", "use backend='reference'");
  }
  return {x.size(0), shape.channels, in_group, strided(x.size(2), 3, stride), strided(x.size(3), 3, stride)};
}

// The same with the weight, checked.
template <class Device>
Grouped3x3 check_weighted(const char* op, const Tensor& x, const Tensor& weight, int64_t stride) {
  check_same_dtype(op, "weight", weight, x);
  check_device(op, "weight", weight, Device::kCuda);
  check_channels_last(op, "weight", weight);
  if (weight.size(0) != x.size(1) || weight.size(2) != 3 || weight.size(3) != 3) {
    fail(op, "weight", sizes_of(weight), "[" + std::to_string(x.size(1)) + ", Cin/groups, 3, 3]",
         "pass the weight of the 3x3 convolution");
  }
  return check_grouped<Device>(op, x, weight.size(1), stride);
}

void check_images(const char* op, const char* name, const Tensor& t, const Tensor& x, const Grouped3x3& sizes) {
  check_channels_last(op, name, t);
  check_same_dtype(op, name, t, x);
  check_device(op, name, t, x.is_cuda());
  if (t.size(0) == sizes.batch && t.size(1) == sizes.channels && t.size(2) == sizes.height.out &&
      t.size(3) == sizes.width.out) {
    return;
  }
  fail(op, name, sizes_of(t), "the output's shape for x " + sizes_of(x),
       "pass the gradient of the convolution's output");
}

// x [N, C, H, W], weight [C, C/groups, 3, 3] -> [N, C, H', W']. out: what is written into, or nothing.
template <class Device>
Tensor grouped_forward(const char* op, Tensor x, Tensor weight, int64_t stride, OptionalTensor scale,
                       OptionalTensor shift, bool relu, OptionalTensor out) {
  const Shape shape = check_activation<Device>(op, "x", x);
  const Grouped3x3 sizes = check_weighted<Device>(op, x, weight, stride);
  VectorPair{"scale, shift", "scale", "shift", scale, shift}.check(op, shape.channels);
  Tensor y = given_or_new(op, {"y", out}, x, {sizes.batch, sizes.channels, sizes.height.out, sizes.width.out},
                          {Named("x", x), Named("weight", weight)});
  const Device on(op, x);
  on.launch(cpu::Grouped3x3Forward{sizes, data(x), data(weight), data(scale), data(shift), relu, written(y)});
  return y;
}

template <class Device>
Tensor grouped_conv3x3_forward(Tensor x, Tensor weight, int64_t stride, OptionalTensor scale, OptionalTensor shift,
                               bool relu) {
  return grouped_forward<Device>("grouped_conv3x3_forward", x, weight, stride, scale, shift, relu, {});
}

template <class Device>
void grouped_conv3x3_forward_out(Tensor x, Tensor weight, int64_t stride, OptionalTensor scale, OptionalTensor shift,
                                 bool relu, Tensor y) {
  grouped_forward<Device>("grouped_conv3x3_forward_out", x, weight, stride, scale, shift, relu, y);
}

// dy [N, C, H, W], weight [C, C/groups, 3, 3] -> like dy
template <class Device>
Tensor grouped_conv3x3_backward_input(Tensor dy, Tensor weight) {
  const char* op = "grouped_conv3x3_backward_input";
  check_activation<Device>(op, "dy", dy);
  const Grouped3x3 sizes = check_weighted<Device>(op, dy, weight, 1);
  Tensor dx = new_channels_last(dy, sizes.batch, sizes.channels, dy.size(2), dy.size(3), aoti_torch_dtype_float32());
  const Device on(op, dy);
  on.launch(cpu::Grouped3x3BackwardInput{sizes, data(dy), data(weight), written(dx)});
  return dx;
}

// dy [N, C, H', W'], x [N, C, H, W] -> [C, in_group, 3, 3], channels_last
template <class Device>
Tensor grouped_conv3x3_backward_weight(Tensor dy, Tensor x, int64_t in_group, int64_t stride) {
  const char* op = "grouped_conv3x3_backward_weight";
  const Grouped3x3 sizes = check_grouped<Device>(op, x, in_group, stride);
  check_images(op, "dy", dy, x, sizes);
  Tensor dw = new_channels_last(x, sizes.channels, in_group, 3, 3, aoti_torch_dtype_float32());
  const Device on(op, x);
  on.launch(cpu::Grouped3x3BackwardWeight{sizes, data(dy), data(x), written(dw)});
  return dw;
}

}  // namespace

}  // namespace fusedres::front

FUSEDRES_OPS(CPU, m) {
  using namespace fusedres::front;
  m.impl<&grouped_conv3x3_forward<Cpu>>("grouped_conv3x3_forward");
  m.impl<&grouped_conv3x3_forward_out<Cpu>>("grouped_conv3x3_forward_out");
  m.impl<&grouped_conv3x3_backward_input<Cpu>>("grouped_conv3x3_backward_input");
  m.impl<&grouped_conv3x3_backward_weight<Cpu>>("grouped_conv3x3_backward_weight");
}
