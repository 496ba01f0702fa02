// fusedres_native on the CPU: checks the arguments, allocates the results, calls the launchers.
#include <torch/csrc/stable/library.h>

#include "../allocate.h"
#include "../checks.h"
#include "channel_ops.h"
#include "launch.h"

namespace fusedres::cpu {

namespace {

void check_activation(const char* op, const char* name, const Tensor& c) {
  if (kernels() == nullptr) fail(op, "this processor", "without AVX2", "AVX2 and FMA", "use backend='reference'");
  check_device(op, name, c, false);
  check_channels_last(op, name, c);
  const ScalarType dtype = c.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16) {
    fail(op, name, dtype_name(dtype), "float32 or bfloat16", "convert it, or use backend='reference'");
  }
  if (c.size(1) == 0) fail(op, name, sizes_of(c), "at least one channel", "use backend='reference'");
}

Shape shape_of(const Tensor& c) {
  const Dtype dtype = c.scalar_type() == ScalarType::Float ? Dtype::float32 : Dtype::bfloat16;
  return {dtype, c.numel() / c.size(1), c.size(1)};
}

const float* data(const Tensor& v) { return v.const_data_ptr<float>(); }
const float* data(const OptionalTensor& v) { return v ? data(*v) : nullptr; }
const uint8_t* mask_data(const OptionalTensor& v) { return v ? v->const_data_ptr<uint8_t>() : nullptr; }
const void* untyped(const OptionalTensor& v) { return v ? v->const_data_ptr() : nullptr; }
float* written(const Tensor& v) { return v.mutable_data_ptr<float>(); }
float* written(const OptionalTensor& v) { return v ? written(*v) : nullptr; }

Window window_of(const char* op, const Tensor& c, int64_t kernel_size, int64_t stride, int64_t padding) {
  check_window(op, c, kernel_size, stride, padding);
  Window w{kernel_size, stride, padding, c.size(1), c.size(2), c.size(3), 0, 0};
  w.out_height = (w.height + 2 * padding - kernel_size) / stride + 1;
  w.out_width = (w.width + 2 * padding - kernel_size) / stride + 1;
  return w;
}

std::tuple<Tensor, Tensor> bn_stats(Tensor c) {
  check_activation("bn_stats", "c", c);
  const Shape shape = shape_of(c);
  Tensor mean = new_vector(c, shape.channels), var = new_vector(c, shape.channels);
  launch_bn_stats(shape, c.const_data_ptr(), written(mean), written(var));
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor> scale_shift(Tensor mean, Tensor var, OptionalTensor weight, OptionalTensor bias,
                                               double eps) {
  const char* op = "bn_scale_shift";
  const int64_t channels = mean.numel();
  check_vector(op, "mean", mean, channels);
  check_vector(op, "var", var, channels);
  check_vector(op, "weight", weight, channels);
  check_vector(op, "bias", bias, channels);
  Tensor invstd = new_vector(mean, channels), scale = new_vector(mean, channels), shift = new_vector(mean, channels);
  bn_scale_shift({data(mean), data(var), data(weight), data(bias), written(invstd), written(scale), written(shift)},
                 eps, channels);
  return {invstd, scale, shift};
}

void check_forward(const char* op, const Tensor& c, const Tensor& scale, const Tensor& shift,
                   const OptionalTensor& residual, const OptionalTensor& residual_scale,
                   const OptionalTensor& residual_shift) {
  check_activation(op, "c", c);
  check_vector(op, "scale", scale, c.size(1));
  check_vector(op, "shift", shift, c.size(1));
  check_like(op, "residual", residual, c);
  check_vector(op, "residual_scale", residual_scale, c.size(1));
  check_vector(op, "residual_shift", residual_shift, c.size(1));
  check_together(op, "residual_scale, residual_shift", residual_scale.has_value(), residual_shift.has_value());
  if (residual_scale && !residual) fail(op, "residual", "None", "a tensor like c", "pass what residual_scale is for");
}

std::tuple<Tensor, OptionalTensor> bn_add_relu_forward(Tensor c, Tensor scale, Tensor shift, OptionalTensor residual,
                                                       OptionalTensor residual_scale, OptionalTensor residual_shift,
                                                       bool relu, bool save_mask) {
  check_forward("bn_add_relu_forward", c, scale, shift, residual, residual_scale, residual_shift);
  Tensor y = new_like(c);
  OptionalTensor mask;
  if (save_mask) mask = new_bytes(c, (c.numel() + 7) / 8);
  launch_bn_add_relu_forward(shape_of(c), c.const_data_ptr(), {data(scale), data(shift)}, untyped(residual),
                             {data(residual_scale), data(residual_shift)}, relu, y.mutable_data_ptr(),
                             mask ? mask->mutable_data_ptr<uint8_t>() : nullptr);
  return {y, mask};
}

// y in the storage of c
void bn_add_relu_forward_(Tensor c, Tensor scale, Tensor shift, OptionalTensor residual,
                          OptionalTensor residual_scale, OptionalTensor residual_shift, bool relu) {
  check_forward("bn_add_relu_forward_", c, scale, shift, residual, residual_scale, residual_shift);
  launch_bn_add_relu_forward(shape_of(c), c.const_data_ptr(), {data(scale), data(shift)}, untyped(residual),
                             {data(residual_scale), data(residual_shift)}, relu, c.mutable_data_ptr(), nullptr);
}

Gradients gradients_of(const char* op, const Tensor& dy, const Tensor& c, const Tensor& scale, const Tensor& shift,
                       const OptionalTensor& mask, bool relu) {
  check_activation(op, "c", c);
  check_like(op, "dy", dy, c);
  check_vector(op, "scale", scale, c.size(1));
  check_vector(op, "shift", shift, c.size(1));
  check_mask(op, mask, c);
  return {dy.const_data_ptr(), c.const_data_ptr(), mask_data(mask), relu, {data(scale), data(shift)}};
}

std::tuple<Tensor, Tensor, OptionalTensor> bn_add_relu_backward_reduce(Tensor dy, Tensor c, Tensor mean, Tensor scale,
                                                                       Tensor shift, OptionalTensor mask, bool relu,
                                                                       OptionalTensor shortcut_c,
                                                                       OptionalTensor shortcut_mean) {
  const char* op = "bn_add_relu_backward_reduce";
  const Gradients gradients = gradients_of(op, dy, c, scale, shift, mask, relu);
  const Shape shape = shape_of(c);
  check_vector(op, "mean", mean, shape.channels);
  check_like(op, "shortcut_c", shortcut_c, c);
  check_vector(op, "shortcut_mean", shortcut_mean, shape.channels);
  check_together(op, "shortcut_c, shortcut_mean", shortcut_c.has_value(), shortcut_mean.has_value());
  Tensor sum = new_vector(c, shape.channels), centered = new_vector(c, shape.channels);
  OptionalTensor shortcut;
  if (shortcut_c) shortcut = new_vector(c, shape.channels);
  launch_bn_add_relu_backward_reduce(shape, gradients, data(mean), untyped(shortcut_c), data(shortcut_mean),
                                     written(sum), written(centered), written(shortcut));
  return {sum, centered, shortcut};
}

std::tuple<Tensor, OptionalTensor, OptionalTensor> backward_coefficients(Tensor sum_dz, Tensor sum_dz_centered,
                                                                         Tensor mean, Tensor invstd, Tensor scale,
                                                                         int64_t rows, bool training) {
  const char* op = "bn_backward_coefficients";
  const int64_t channels = sum_dz.numel();
  check_rows(op, rows);
  check_vector(op, "sum_dz", sum_dz, channels);
  check_vector(op, "sum_dz_centered", sum_dz_centered, channels);
  check_vector(op, "mean", mean, channels);
  check_vector(op, "invstd", invstd, channels);
  check_vector(op, "scale", scale, channels);
  Tensor dweight = new_vector(mean, channels);
  OptionalTensor b, k;
  if (training) {
    b = new_vector(mean, channels);
    k = new_vector(mean, channels);
  }
  bn_backward_coefficients({data(sum_dz), data(sum_dz_centered), data(mean), data(invstd), data(scale),
                            written(dweight), written(b), written(k)},
                           rows, channels);
  return {dweight, b, k};
}

Coefficients coefficients_of(const char* op, const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& k,
                             int64_t channels) {
  check_vector(op, "A", a, channels);
  check_vector(op, "B", b, channels);
  check_vector(op, "K", k, channels);
  check_together(op, "B, K", b.has_value(), k.has_value());
  return {data(a), data(b), data(k)};
}

// Writes dc, and into dresidual, if there is one, what it is to hold.
void backward_input(const char* op, const Tensor& dy, const Tensor& c, const Tensor& scale, const Tensor& shift,
                    const Tensor& a, const OptionalTensor& b, const OptionalTensor& k, const OptionalTensor& mask,
                    bool relu, const OptionalTensor& shortcut_c, const OptionalTensor& shortcut_a,
                    const OptionalTensor& shortcut_b, const OptionalTensor& shortcut_k, Tensor dc,
                    OptionalTensor dresidual) {
  const Gradients gradients = gradients_of(op, dy, c, scale, shift, mask, relu);
  const Shape shape = shape_of(c);
  const Coefficients main = coefficients_of(op, a, b, k, shape.channels);
  check_like(op, "shortcut_c", shortcut_c, c);
  const Coefficients shortcut = coefficients_of(op, shortcut_a, shortcut_b, shortcut_k, shape.channels);
  check_together(op, "shortcut_c, shortcut_A", shortcut_c.has_value(), shortcut_a.has_value());
  launch_bn_add_relu_backward_input(shape, gradients, main, untyped(shortcut_c), shortcut, dc.mutable_data_ptr(),
                                    dresidual ? dresidual->mutable_data_ptr() : nullptr);
}

std::tuple<Tensor, OptionalTensor> bn_add_relu_backward_input(
    Tensor dy, Tensor c, Tensor scale, Tensor shift, Tensor a, OptionalTensor b, OptionalTensor k, OptionalTensor mask,
    bool relu, OptionalTensor shortcut_c, OptionalTensor shortcut_a, OptionalTensor shortcut_b,
    OptionalTensor shortcut_k, bool save_dz) {
  const char* op = "bn_add_relu_backward_input";
  check_activation(op, "c", c);
  Tensor dc = new_like(c);
  OptionalTensor dresidual;
  if (shortcut_c || save_dz) dresidual = new_like(c);
  backward_input(op, dy, c, scale, shift, a, b, k, mask, relu, shortcut_c, shortcut_a, shortcut_b, shortcut_k, dc,
                 dresidual);
  return {dc, dresidual};
}

OptionalTensor bn_add_relu_backward_input_of_c_(Tensor dy, Tensor c, Tensor scale, Tensor shift, Tensor a,
                                                OptionalTensor b, OptionalTensor k, OptionalTensor mask, bool relu,
                                                OptionalTensor shortcut_c, OptionalTensor shortcut_a,
                                                OptionalTensor shortcut_b, OptionalTensor shortcut_k, bool save_dz) {
  const char* op = "bn_add_relu_backward_input_of_c_";
  check_activation(op, "c", c);
  OptionalTensor dz;
  if (save_dz && !shortcut_c) dz = new_like(c);
  backward_input(op, dy, c, scale, shift, a, b, k, mask, relu, shortcut_c, shortcut_a, shortcut_b, shortcut_k, c,
                 shortcut_c ? shortcut_c : dz);
  return dz;
}

// dc in the storage of dy, without a second result
void bn_add_relu_backward_input_(Tensor dy, Tensor c, Tensor scale, Tensor shift, Tensor a, OptionalTensor b,
                                 OptionalTensor k, OptionalTensor mask, bool relu) {
  const char* op = "bn_add_relu_backward_input_";
  const Gradients gradients = gradients_of(op, dy, c, scale, shift, mask, relu);
  const Shape shape = shape_of(c);
  launch_bn_add_relu_backward_input(shape, gradients, coefficients_of(op, a, b, k, shape.channels), nullptr, {},
                                    dy.mutable_data_ptr(), nullptr);
}

Tensor relu_backward(Tensor dy, Tensor mask) {
  check_activation("relu_backward", "dy", dy);
  check_mask("relu_backward", mask, dy);
  Tensor dz = new_like(dy);
  launch_relu_backward(shape_of(dy), dy.const_data_ptr(), mask.const_data_ptr<uint8_t>(), dz.mutable_data_ptr());
  return dz;
}

std::tuple<Tensor, OptionalTensor> bn_relu_maxpool_forward(Tensor c, Tensor scale, Tensor shift, int64_t kernel_size,
                                                           int64_t stride, int64_t padding, bool save_indices) {
  const char* op = "bn_relu_maxpool_forward";
  check_activation(op, "c", c);
  const Window window = window_of(op, c, kernel_size, stride, padding);
  check_vector(op, "scale", scale, window.channels);
  check_vector(op, "shift", shift, window.channels);
  const auto make = [&](int32_t dtype) {
    return new_channels_last(c, c.size(0), window.channels, window.out_height, window.out_width, dtype);
  };
  Tensor y = make(dtype_code(c));
  OptionalTensor indices;
  if (save_indices) indices = make(aoti_torch_dtype_uint8());
  launch_bn_relu_maxpool_forward(shape_of(c).dtype, c.size(0), window, c.const_data_ptr(), {data(scale), data(shift)},
                                 y.mutable_data_ptr(), indices ? indices->mutable_data_ptr<uint8_t>() : nullptr);
  return {y, indices};
}

std::tuple<Tensor, Tensor> bn_relu_maxpool_backward_reduce(Tensor dy, Tensor indices, Tensor c, Tensor mean,
                                                           int64_t kernel_size, int64_t stride, int64_t padding) {
  const char* op = "bn_relu_maxpool_backward_reduce";
  check_activation(op, "c", c);
  const Window window = window_of(op, c, kernel_size, stride, padding);
  check_pooled(op, dy, indices, c, window.out_height, window.out_width);
  check_vector(op, "mean", mean, window.channels);
  Tensor sum = new_vector(c, window.channels), centered = new_vector(c, window.channels);
  launch_bn_relu_maxpool_backward_reduce(shape_of(c).dtype, c.size(0), window, dy.const_data_ptr(),
                                         indices.const_data_ptr<uint8_t>(), c.const_data_ptr(), data(mean),
                                         written(sum), written(centered));
  return {sum, centered};
}

Tensor bn_relu_maxpool_backward_input(Tensor dy, Tensor indices, Tensor c, Tensor a, OptionalTensor b,
                                      OptionalTensor k, int64_t kernel_size, int64_t stride, int64_t padding) {
  const char* op = "bn_relu_maxpool_backward_input";
  check_activation(op, "c", c);
  const Window window = window_of(op, c, kernel_size, stride, padding);
  check_pooled(op, dy, indices, c, window.out_height, window.out_width);
  const Coefficients main = coefficients_of(op, a, b, k, window.channels);
  Tensor dc = new_like(c);
  launch_bn_relu_maxpool_backward_input(shape_of(c).dtype, c.size(0), window, dy.const_data_ptr(),
                                        indices.const_data_ptr<uint8_t>(), c.const_data_ptr(), main,
                                        dc.mutable_data_ptr());
  return dc;
}

// Whether this processor multiplies t's dtype.
void check_convolutions(const char* op, const char* name, const Tensor& t) {
  if (convolutions(shape_of(t).dtype) != nullptr) return;
  fail(op, name, dtype_name(t.scalar_type()), "float32 on this processor", "convert it, or use backend='reference'");
}

// dy [N, Cout, H', W'], x [N, Cin, H, W] -> [Cout, Cin, kernel_height, kernel_width] in float32, channels_last
Tensor conv_backward_weight(Tensor dy, Tensor x, int64_t kernel_height, int64_t kernel_width, int64_t stride_height,
                            int64_t stride_width, int64_t padding_height, int64_t padding_width,
                            int64_t dilation_height, int64_t dilation_width) {
  const char* op = "conv_backward_weight";
  check_activation(op, "dy", dy);
  check_activation(op, "x", x);
  if (dy.scalar_type() != x.scalar_type()) {
    fail(op, "dy", dtype_name(dy.scalar_type()), dtype_name(x.scalar_type()), "pass tensors of one dtype");
  }
  check_convolutions(op, "x", x);
  const ConvAxis height{x.size(2), dy.size(2), kernel_height, stride_height, padding_height, dilation_height};
  const ConvAxis width{x.size(3), dy.size(3), kernel_width, stride_width, padding_width, dilation_width};
  check_convolution(op, dy, x, height.kernel, height.stride, height.padding, height.dilation, 2);
  check_convolution(op, dy, x, width.kernel, width.stride, width.padding, width.dilation, 3);
  Tensor dw = new_channels_last(x, dy.size(1), x.size(1), kernel_height, kernel_width, aoti_torch_dtype_float32());
  ConvWeightArgs args{};
  args.dtype = shape_of(x).dtype;
  args.batch = x.size(0);
  args.in_channels = x.size(1);
  args.out_channels = dy.size(1);
  args.height = height;
  args.width = width;
  args.dy = dy.const_data_ptr();
  args.x = x.const_data_ptr();
  args.dw = written(dw);
  launch_conv_backward_weight(args);
  return dw;
}

// weight [Cout, Cin, 1, 1] of a convolution from or to x, as dimension `of` says
void check_pointwise(const char* op, const char* name, const Tensor& x, const Tensor& weight, int64_t of) {
  check_activation(op, name, x);
  if (weight.scalar_type() != x.scalar_type()) {
    fail(op, "weight", dtype_name(weight.scalar_type()), dtype_name(x.scalar_type()), "pass tensors of one dtype");
  }
  check_channels_last(op, "weight", weight);
  check_device(op, "weight", weight, false);
  const std::string channels = std::to_string(x.size(1));
  if (weight.size(of) != x.size(1) || weight.size(2) != 1 || weight.size(3) != 1) {
    fail(op, "weight", sizes_of(weight), of == 0 ? "[" + channels + ", Cin, 1, 1]" : "[Cout, " + channels + ", 1, 1]",
         "pass the weight of the 1x1 convolution");
  }
  check_convolutions(op, name, x);
  if (x.scalar_type() != ScalarType::Float && x.size(1) % 2 != 0) fail(op, name, channels + " channels", "an even number", "use backend='reference'");
}

Conv1x1InputArgs input_args(const char* op, const Tensor& dy, const Tensor& weight) {
  check_pointwise(op, "dy", dy, weight, 0);
  Conv1x1InputArgs args{};
  args.batch = dy.size(0);
  args.in_channels = weight.size(1);
  args.out_channels = dy.size(1);
  args.dtype = shape_of(dy).dtype;
  args.dy = dy.const_data_ptr();
  return args;
}

// dy [N, Cout, H, W], weight [Cout, Cin, 1, 1], shortcut_dy and the result [N, Cin, H, W]
Tensor conv_backward_input(Tensor dy, Tensor weight, OptionalTensor shortcut_dy, OptionalTensor mask) {
  const char* op = "conv_backward_input";
  Conv1x1InputArgs args = input_args(op, dy, weight);
  const int64_t height = dy.size(2), width = dy.size(3);
  Tensor dx = new_channels_last(dy, dy.size(0), weight.size(1), height, width, dtype_code(dy));
  check_like(op, "shortcut_dy", shortcut_dy, dx);
  if (mask && !shortcut_dy) fail(op, "shortcut_mask", "without shortcut_dy", "both or no mask", "pass the pair");
  check_mask(op, mask, dx);
  if (mask && args.in_channels % 8 != 0) {
    fail(op, "shortcut_mask", std::to_string(args.in_channels) + " bits a position", "a multiple of 8",
         "use backend='reference'");
  }
  args.height = {height, height, 1, 1, 0, 1};
  args.width = {width, width, 1, 1, 0, 1};
  args.shortcut_dy = untyped(shortcut_dy);
  args.mask = mask_data(mask);
  args.dx = dx.mutable_data_ptr();
  launch_conv_backward_input(args, weight.const_data_ptr());
  return dx;
}

// dx [N, Cin, H, W], added to; dy [N, Cout, H', W']
void conv_backward_input_(Tensor dx, Tensor dy, Tensor weight, int64_t stride_height, int64_t stride_width) {
  const char* op = "conv_backward_input_";
  Conv1x1InputArgs args = input_args(op, dy, weight);
  check_activation(op, "dx", dx);
  if (dx.scalar_type() != dy.scalar_type()) {
    fail(op, "dx", dtype_name(dx.scalar_type()), dtype_name(dy.scalar_type()), "pass tensors of one dtype");
  }
  if (dx.size(1) != args.in_channels) {
    fail(op, "dx", sizes_of(dx), std::to_string(args.in_channels) + " channels", "pass the input's gradient");
  }
  check_convolution(op, dy, dx, 1, stride_height, 0, 1, 2);
  check_convolution(op, dy, dx, 1, stride_width, 0, 1, 3);
  args.height = {dx.size(2), dy.size(2), 1, stride_height, 0, 1};
  args.width = {dx.size(3), dy.size(3), 1, stride_width, 0, 1};
  args.dx = dx.mutable_data_ptr();
  args.shortcut_dy = args.dx;
  launch_conv_backward_input(args, weight.const_data_ptr());
}

// x [N, Cin, H, W], weight [Cout, Cin, 1, 1], residual and y [N, Cout, H, W]
Tensor conv1x1_forward(Tensor x, Tensor weight, Tensor scale, Tensor shift, OptionalTensor residual,
                       OptionalTensor residual_scale, OptionalTensor residual_shift, bool relu) {
  const char* op = "conv1x1_forward";
  check_pointwise(op, "x", x, weight, 1);
  const int64_t channels = weight.size(0);
  check_vector(op, "scale", scale, channels);
  check_vector(op, "shift", shift, channels);
  check_together(op, "residual_scale, residual_shift", residual_scale.has_value(), residual_shift.has_value());
  if (residual_scale && !residual) fail(op, "residual_scale", "without residual", "both", "pass the residual");
  check_vector(op, "residual_scale", residual_scale, channels);
  check_vector(op, "residual_shift", residual_shift, channels);
  Tensor y = new_channels_last(x, x.size(0), channels, x.size(2), x.size(3), dtype_code(x));
  check_like(op, "residual", residual, y);
  Conv1x1Args args{};
  args.in_channels = x.size(1);
  args.out_channels = channels;
  args.form = residual_scale ? Residual::projection : residual ? Residual::identity : Residual::none;
  args.relu = relu;
  args.dtype = shape_of(x).dtype;
  args.x = x.const_data_ptr();
  args.scale = data(scale);
  args.shift = data(shift);
  args.residual = untyped(residual);
  args.residual_scale = data(residual_scale);
  args.residual_shift = data(residual_shift);
  args.y = y.mutable_data_ptr();
  launch_conv1x1_forward(args, x.numel() / x.size(1), weight.const_data_ptr());
  return y;
}

}  // namespace

}  // namespace fusedres::cpu

STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CPU, m) {
  using namespace fusedres::cpu;
  m.impl("bn_stats", TORCH_BOX(&bn_stats));
  m.impl("bn_scale_shift", TORCH_BOX(&scale_shift));
  m.impl("bn_add_relu_forward", TORCH_BOX(&bn_add_relu_forward));
  m.impl("bn_add_relu_forward_", TORCH_BOX(&bn_add_relu_forward_));
  m.impl("bn_add_relu_backward_reduce", TORCH_BOX(&bn_add_relu_backward_reduce));
  m.impl("bn_backward_coefficients", TORCH_BOX(&backward_coefficients));
  m.impl("bn_add_relu_backward_input", TORCH_BOX(&bn_add_relu_backward_input));
  m.impl("bn_add_relu_backward_input_", TORCH_BOX(&bn_add_relu_backward_input_));
  m.impl("bn_add_relu_backward_input_of_c_", TORCH_BOX(&bn_add_relu_backward_input_of_c_));
  m.impl("relu_backward", TORCH_BOX(&relu_backward));
  m.impl("bn_relu_maxpool_forward", TORCH_BOX(&bn_relu_maxpool_forward));
  m.impl("bn_relu_maxpool_backward_reduce", TORCH_BOX(&bn_relu_maxpool_backward_reduce));
  m.impl("bn_relu_maxpool_backward_input", TORCH_BOX(&bn_relu_maxpool_backward_input));
  m.impl("conv_backward_weight", TORCH_BOX(&conv_backward_weight));
  m.impl("conv1x1_forward", TORCH_BOX(&conv1x1_forward));
  m.impl("conv_backward_input", TORCH_BOX(&conv_backward_input));
  m.impl("conv_backward_input_", TORCH_BOX(&conv_backward_input_));
}
