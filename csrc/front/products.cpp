// Ops of convolutions that the CPU has no launcher for, or another algorithm: each checks its arguments, allocates its
// results and calls the launcher of CUDA: a build without CUDA leaves this file out.
#include <tuple>

#include "allocate.h"
#include "conv_forward.h"
#include "device_ops.h"
#include "devices.h"

namespace fusedres::front {

namespace {

// dy and c [N, Cout, H, W], weight [Cout, Cin, 1, 1], shortcut_dy [N, Cin, H, W] -> dx like it, dc like c
template <class Device>
std::tuple<Tensor, Tensor> conv1x1_backward_input(Tensor dy, Tensor c, Tensor scale, Tensor shift, Tensor a,
                                                  OptionalTensor b, OptionalTensor k, Tensor weight, bool relu,
                                                  OptionalTensor shortcut_dy, OptionalTensor mask) {
  const char* op = "conv1x1_backward_input";
  const Shape shape = check_1x1<Device>(op, "c", c, weight, 0);
  check_like(op, "dy", dy, c);
  VectorPair{"scale, shift", "scale", "shift", scale, shift}.check(op, shape.channels);
  const Coefficients grads = check_coefficients(op, a, b, k, shape.channels);
  const int64_t channels = weight.size(1);
  const Device on(
      op, c,
      {Named("dy", dy), Named("scale", scale), Named("shift", shift), Named("A", a), Named("B", b), Named("K", k),
       Named("weight", weight), Named("shortcut_dy", shortcut_dy), Named("shortcut_mask", mask)});
  Tensor dx = new_channels_last(c, c.size(0), channels, c.size(2), c.size(3), dtype_code(c)), dc = new_like(c);
  check_like(op, "shortcut_dy", shortcut_dy, dx);
  if (mask && !shortcut_dy) fail(op, "shortcut_mask", "without shortcut_dy", "both or no mask", "pass the pair");
  check_mask(op, mask, dx);
  on.launch(Conv1x1BackwardInput{shape.dtype, shape.rows, channels, shape.channels, dy.const_data_ptr(),
                                 c.const_data_ptr(), relu, data(scale), data(shift), grads, weight.const_data_ptr(),
                                 untyped(shortcut_dy), byte_data(mask), dx.mutable_data_ptr(), dc.mutable_data_ptr()});
  return {dx, dc};
}

// As of 3x3 convolutions by Winograd's algorithm; `tile` is 0: none.
template <class Device>
std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor, bool> conv3x3_forward(
    Tensor x, Tensor weight, OptionalTensor in_scale, OptionalTensor in_shift, OptionalTensor scale,
    OptionalTensor shift, OptionalTensor residual, OptionalTensor residual_scale, OptionalTensor residual_shift,
    bool relu, bool save_stats, int64_t tile, int64_t stride, bool save_mask) {
  const char* op = "conv3x3_forward";
  if (tile != 0) fail(op, "tile", std::to_string(tile), "0", "Winograd's algorithm is the CPU's");
  auto [y, mask, mean, var] =
      conv_forward<Device>(op, 3, x, weight, std::nullopt, stride, in_scale, in_shift, scale, shift, residual,
                           residual_scale, residual_shift, relu, save_mask, save_stats);
  return {y, mask, mean, var, true};
}

Tensor new_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return new_strided(like, 2, sizes, strides, aoti_torch_dtype_float32());
}

// dy [N, Cout, H, W], c [N, Cin, H, W] -> Rc [Cout, Cin], dbias [Cout]
template <class Device>
std::tuple<Tensor, Tensor> conv1x1_backward_weight(Tensor dy, OptionalTensor mask, Tensor c, Tensor scale, Tensor shift,
                                                   OptionalTensor center) {
  const char* op = "conv1x1_backward_weight";
  const Shape shape = check_activation<Device>(op, "c", c);
  const int64_t channels = check_activation<Device>(op, "dy", dy).channels;
  Device::check_convolutions(op, "c", c);
  Device::check_convolutions(op, "dy", dy);
  check_same_dtype(op, "dy", dy, c);
  if (dy.size(0) != c.size(0) || dy.size(2) != c.size(2) || dy.size(3) != c.size(3)) {
    fail(op, "dy", sizes_of(dy), "the images of c " + sizes_of(c), "pass the gradient of the convolution's output");
  }
  check_mask(op, mask, dy);
  VectorPair{"scale, shift", "scale", "shift", scale, shift}.check(op, shape.channels);
  check_vector(op, "center", center, shape.channels);
  const Device on(
      op, c,
      {Named("dy", dy), Named("mask", mask), Named("scale", scale), Named("shift", shift), Named("center", center)});
  Tensor r = new_matrix(c, channels, shape.channels), dbias = new_vector(c, channels);
  on.launch(Conv1x1BackwardWeight{shape.dtype, shape.rows, shape.channels, channels, dy.const_data_ptr(),
                                  byte_data(mask), c.const_data_ptr(), data(scale), data(shift), data(center),
                                  written(r), written(dbias)});
  return {r, dbias};
}

// c [N, C, H, W] -> m [C], S [C, C]
template <class Device>
std::tuple<Tensor, Tensor> gram(Tensor c, Tensor scale, Tensor shift) {
  const char* op = "gram";
  const Shape shape = check_activation<Device>(op, "c", c);
  Device::check_convolutions(op, "c", c);
  VectorPair{"scale, shift", "scale", "shift", scale, shift}.check(op, shape.channels);
  const Device on(op, c, {Named("scale", scale), Named("shift", shift)});
  Tensor m = new_vector(c, shape.channels), s = new_matrix(c, shape.channels, shape.channels);
  on.launch(Gram{shape.dtype, shape.rows, shape.channels, c.const_data_ptr(), data(scale), data(shift), written(m),
                 written(s)});
  return {m, s};
}

}  // namespace

}  // namespace fusedres::front

FUSEDRES_OPS(CUDA, m) {
  using namespace fusedres::front;
  m.impl("conv3x3_forward", TORCH_BOX(&conv3x3_forward<Cuda>));
  m.impl("conv1x1_backward_input", TORCH_BOX(&conv1x1_backward_input<Cuda>));
  m.impl("conv1x1_backward_weight", TORCH_BOX(&conv1x1_backward_weight<Cuda>));
  m.impl("gram", TORCH_BOX(&gram<Cuda>));
}
