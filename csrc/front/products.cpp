// Ops of convolutions that the CPU has no launcher for, or another algorithm: each checks its arguments, allocates its
// results and calls the launcher of CUDA: a build without CUDA leaves this file out.
#include <tuple>

#include "../cuda/halo_plan.h"
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

// dy and c [N, Cout, H, W], weight [Cout, Cin, 3, 3], shortcut_dy [N, Cin, H, W] -> dx like it, dc like c. `tile` as in
// the forward.
template <class Device>
std::tuple<Tensor, OptionalTensor, bool> conv3x3_backward_input(Tensor dy, Tensor weight, OptionalTensor shortcut_dy,
                                                                OptionalTensor mask, int64_t tile, OptionalTensor c,
                                                                OptionalTensor scale, OptionalTensor shift,
                                                                OptionalTensor a, OptionalTensor b, OptionalTensor k,
                                                                bool relu) {
  const char* op = "conv3x3_backward_input";
  if (tile != 0) fail(op, "tile", std::to_string(tile), "0", "Winograd's algorithm is the CPU's");
  const Shape shape = check_weight<Device>(op, "dy", dy, weight, 0, 3);
  check_like(op, "c", c, dy);
  check_together(op, "c, A", c.has_value(), a.has_value());
  check_together(op, "c, scale", c.has_value(), scale.has_value());
  VectorPair{"scale, shift", "scale", "shift", scale, shift}.check(op, shape.channels);
  const Coefficients grads = check_coefficients(op, a, b, k, shape.channels);
  if (!c && (b || relu)) fail(op, "c", "absent", "c with B, K and relu", "pass what BN was applied to");
  const int64_t channels = weight.size(1), height = dy.size(2), width = dy.size(3);
  if (!cuda::halo_fits(width)) {
    fail(op, "dy", std::to_string(width) + " positions in a line", "fewer", "use backend='reference'");
  }
  const Device on(
      op, dy,
      {Named("c", c), Named("scale", scale), Named("shift", shift), Named("A", a), Named("B", b), Named("K", k),
       Named("weight", weight), Named("shortcut_dy", shortcut_dy), Named("shortcut_mask", mask)});
  Tensor dx = new_channels_last(dy, dy.size(0), channels, height, width, dtype_code(dy));
  OptionalTensor dc;
  if (c) dc = new_like(dy);
  check_like(op, "shortcut_dy", shortcut_dy, dx);
  if (mask && !shortcut_dy) fail(op, "shortcut_mask", "without shortcut_dy", "both or no mask", "pass the pair");
  check_mask(op, mask, dx);
  on.launch(
      Conv3x3BnBackwardInput{{shape.dtype, shape.rows, channels, shape.channels, dy.const_data_ptr(), untyped(c), relu,
                              data(scale), data(shift), grads, weight.const_data_ptr(), untyped(shortcut_dy),
                              byte_data(mask), dx.mutable_data_ptr(), dc ? dc->mutable_data_ptr() : nullptr},
                             height,
                             width});
  return {dx, dc, true};
}

Tensor new_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return new_strided(like, 2, sizes, strides, aoti_torch_dtype_float32());
}

// Checks c [N, Cin, H, W] and the gradient dy [N, Cout, H, W] of a 1x1 convolution's output; the shape of c.
template <class Device>
Shape check_gradient_of_output(const char* op, const Tensor& dy, const OptionalTensor& mask, const Tensor& c) {
  const Shape shape = check_activation<Device>(op, "c", c);
  check_activation<Device>(op, "dy", dy);
  Device::check_convolutions(op, "c", c);
  Device::check_convolutions(op, "dy", dy);
  check_same_dtype(op, "dy", dy, c);
  if (dy.size(0) != c.size(0) || dy.size(2) != c.size(2) || dy.size(3) != c.size(3)) {
    fail(op, "dy", sizes_of(dy), "the images of c " + sizes_of(c), "pass the gradient of the convolution's output");
  }
  check_mask(op, mask, dy);
  return shape;
}

// dy [N, Cout, H, W], c [N, Cin, H, W] -> Rc [Cout, Cin], dbias [Cout]
template <class Device>
std::tuple<Tensor, Tensor> conv1x1_backward_weight(Tensor dy, OptionalTensor mask, Tensor c, Tensor scale, Tensor shift,
                                                   OptionalTensor center) {
  const char* op = "conv1x1_backward_weight";
  const Shape shape = check_gradient_of_output<Device>(op, dy, mask, c);
  const int64_t channels = dy.size(1);
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

// t is a float32 matrix [rows, columns].
void check_matrix(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  if (t.scalar_type() != ScalarType::Float) {
    fail(op, name, dtype_name(t.scalar_type()), "float32", "weights and moments here have the accumulation dtype");
  }
  if (t.dim() != 2 || t.size(0) != rows || t.size(1) != columns || !t.is_contiguous()) {
    fail(op, name, layout_of(t), "contiguous [" + std::to_string(rows) + ", " + std::to_string(columns) + "]",
         "pass one value for each pair of channels");
  }
}
void check_matrix(const char* op, const char* name, const OptionalTensor& t, int64_t rows, int64_t columns) {
  if (t) check_matrix(op, name, *t, rows, columns);
}

// A weight [Cout, Cin, 1, 1] whose output was never stored, and its bias: Shape.rows is Cout, .channels Cin.
template <class Device>
Shape check_expansion(const char* op, const Tensor& weight, const OptionalTensor& bias) {
  const Shape shape = check_activation<Device>(op, "weight", weight);
  Device::check_convolutions(op, "weight", weight);
  if (weight.size(2) != 1 || weight.size(3) != 1) {
    fail(op, "weight", sizes_of(weight), "[Cout, Cin, 1, 1]", "pass the weight of a 1x1 convolution");
  }
  if (shape.rows == 0 || shape.rows > cuda::kMaxChannels) {
    fail(op, "weight", sizes_of(weight), "one to 2^26 output channels", "use backend='reference'");
  }
  if (!bias) return shape;
  check_same_dtype(op, "bias", *bias, weight);
  if (bias->dim() != 1 || bias->size(0) != shape.rows || !bias->is_contiguous()) {
    fail(op, "bias", layout_of(*bias), "contiguous [" + std::to_string(shape.rows) + "]",
         "pass the bias of this convolution");
  }
  return shape;
}

// weight [Cout, Cin, 1, 1], m [Cin], S [Cin, Cin] -> mean [Cout], var [Cout], center [Cin]
template <class Device>
std::tuple<Tensor, Tensor, Tensor> gram_output_stats(Tensor weight, OptionalTensor bias, Tensor m, Tensor s) {
  const char* op = "gram_output_stats";
  const auto [dtype, cout, cin] = check_expansion<Device>(op, weight, bias);
  check_vector(op, "m", m, cin);
  check_matrix(op, "S", s, cin, cin);
  const Device on(op, weight, {Named("bias", bias), Named("m", m), Named("S", s)});
  Tensor mean = new_vector(weight, cout), var = new_vector(weight, cout), center = new_vector(weight, cin);
  on.launch(GramOutputStats{dtype, cin, cout, weight.const_data_ptr(), untyped(bias), data(m), data(s), written(mean),
                            written(var), written(center)});
  return {mean, var, center};
}

// r [Cout, Cin], sum_dz [Cout], weight [Cout, Cin, 1, 1] -> dweight [Cout], dW and weight_dz [Cout, Cin]; with m, S and
// center also weight_a [Cin, Cin] and offset [Cin]
template <class Device>
std::tuple<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor> gram_backward_coefficients(
    Tensor r, Tensor sum_dz, Tensor weight, OptionalTensor bias, Tensor mean, Tensor invstd, Tensor scale, int64_t rows,
    OptionalTensor m, OptionalTensor s, OptionalTensor center) {
  const char* op = "gram_backward_coefficients";
  const auto [dtype, cout, cin] = check_expansion<Device>(op, weight, bias);
  check_matrix(op, "r", r, cout, cin);
  for (const auto& [name, vector] : {std::pair("sum_dz", &sum_dz), std::pair("mean", &mean),
                                     std::pair("invstd", &invstd), std::pair("scale", &scale)}) {
    check_vector(op, name, *vector, cout);
  }
  check_together(op, "m, S", m.has_value(), s.has_value());
  check_together(op, "m, center", m.has_value(), center.has_value());
  check_vector(op, "m", m, cin);
  check_matrix(op, "S", s, cin, cin);
  check_vector(op, "center", center, cin);
  const Device on(
      op, weight,
      {Named("r", r), Named("sum_dz", sum_dz), Named("bias", bias), Named("mean", mean), Named("invstd", invstd),
       Named("scale", scale), Named("m", m), Named("S", s), Named("center", center)});
  Tensor dweight = new_vector(weight, cout), dw = new_matrix(weight, cout, cin);
  Tensor weight_dz = new_matrix(weight, cout, cin);
  OptionalTensor weight_a, offset;
  if (m) weight_a = new_matrix(weight, cin, cin), offset = new_vector(weight, cin);
  on.launch(GramBackwardCoefficients{dtype, rows, cin, cout, data(r), data(sum_dz), weight.const_data_ptr(),
                                     untyped(bias), data(mean), data(invstd), data(scale), data(m), data(s),
                                     data(center), written(dweight), written(dw), written(weight_dz), written(weight_a),
                                     written(offset)});
  return {dweight, dw, weight_dz, weight_a, offset};
}

// dy [N, Cout, H, W], c [N, Cin, H, W], weight_dz [Cout, Cin], weight_a [Cin, Cin] -> dz_below like c, its sums [Cin]
template <class Device>
std::tuple<Tensor, Tensor, Tensor> conv1x1_gram_backward_input(Tensor dy, OptionalTensor mask, Tensor c, Tensor mean,
                                                               Tensor scale, Tensor shift, Tensor weight_dz,
                                                               OptionalTensor weight_a, OptionalTensor center,
                                                               OptionalTensor offset) {
  const char* op = "conv1x1_gram_backward_input";
  const Shape shape = check_gradient_of_output<Device>(op, dy, mask, c);
  const int64_t cout = dy.size(1), cin = shape.channels;
  check_vector(op, "mean", mean, cin);
  VectorPair{"scale, shift", "scale", "shift", scale, shift}.check(op, cin);
  check_matrix(op, "weight_dz", weight_dz, cout, cin);
  check_together(op, "weight_a, center", weight_a.has_value(), center.has_value());
  check_together(op, "weight_a, offset", weight_a.has_value(), offset.has_value());
  check_matrix(op, "weight_a", weight_a, cin, cin);
  check_vector(op, "center", center, cin);
  check_vector(op, "offset", offset, cin);
  const Device on(
      op, c,
      {Named("dy", dy), Named("mask", mask), Named("mean", mean), Named("scale", scale), Named("shift", shift),
       Named("weight_dz", weight_dz), Named("weight_a", weight_a), Named("center", center), Named("offset", offset)});
  Tensor dz_below = new_like(c), sum_dz = new_vector(c, cin), centered = new_vector(c, cin);
  on.launch(Conv1x1GramBackwardInput{shape.dtype, shape.rows, cin, cout, dy.const_data_ptr(), byte_data(mask),
                                     c.const_data_ptr(), data(mean), data(scale), data(shift), data(weight_dz),
                                     data(weight_a), data(center), data(offset), dz_below.mutable_data_ptr(),
                                     written(sum_dz), written(centered)});
  return {dz_below, sum_dz, centered};
}

}  // namespace

}  // namespace fusedres::front

FUSEDRES_OPS(CUDA, m) {
  using namespace fusedres::front;
  m.impl<&conv3x3_forward<Cuda>>("conv3x3_forward");
  m.impl<&conv3x3_backward_input<Cuda>>("conv3x3_backward_input");
  m.impl<&conv1x1_backward_input<Cuda>>("conv1x1_backward_input");
  m.impl<&conv1x1_backward_weight<Cuda>>("conv1x1_backward_weight");
  m.impl<&gram<Cuda>>("gram");
  m.impl<&gram_output_stats<Cuda>>("gram_output_stats");
  m.impl<&gram_backward_coefficients<Cuda>>("gram_backward_coefficients");
  m.impl<&conv1x1_gram_backward_input<Cuda>>("conv1x1_gram_backward_input");
}
