// Batch normalisation, addition and ReLU: each op checks its arguments, allocates its results and calls the device's
// launcher.
#include "allocate.h"
#include "device_ops.h"
#include "devices.h"
#include "results.h"

namespace fusedres::front {

namespace {

template <class Device>
std::tuple<Tensor, Tensor> bn_stats(Tensor c) {
  const char* op = "bn_stats";
  const Shape shape = check_activation<Device>(op, "c", c);
  const Device on(op, c);
  Tensor mean = new_vector(c, shape.channels), var = new_vector(c, shape.channels);
  on.launch(BnStats{shape, c.const_data_ptr(), written(mean), written(var)});
  return {mean, var};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> bn_scale_shift(Tensor mean, Tensor var, OptionalTensor weight, OptionalTensor bias,
                                                  double eps) {
  const char* op = "bn_scale_shift";
  const int64_t channels = mean.numel();
  check_device(op, "mean", mean, Device::kCuda);
  check_vector(op, "mean", mean, channels);
  check_vector(op, "var", var, channels);
  const Device on(op, mean, {Named("var", var), Named("weight", weight), Named("bias", bias)});
  const Parameter w = Device::parameter_of(op, "weight", weight, channels);
  const Parameter b = Device::parameter_of(op, "bias", bias, channels);
  Tensor invstd = new_vector(mean, channels), scale = new_vector(mean, channels), shift = new_vector(mean, channels);
  on.launch(BnScaleShift{channels, data(mean), data(var), w, b, eps, written(invstd), written(scale), written(shift)});
  return {invstd, scale, shift};
}

// Checks all arguments but c, and writes y, and the mask if there is one. In place, y is c.
template <class Device>
void add_relu_forward(const char* op, const Shape& shape, const Tensor& c, const Tensor& scale, const Tensor& shift,
                      const OptionalTensor& residual, const OptionalTensor& residual_scale,
                      const OptionalTensor& residual_shift, bool relu, const Tensor& y, const OptionalTensor& mask) {
  check_vector(op, "scale", scale, shape.channels);
  check_vector(op, "shift", shift, shape.channels);
  check_like(op, "residual", residual, c);
  check_vector(op, "residual_scale", residual_scale, shape.channels);
  check_vector(op, "residual_shift", residual_shift, shape.channels);
  check_together(op, "residual_scale, residual_shift", residual_scale.has_value(), residual_shift.has_value());
  if (residual_scale && !residual) fail(op, "residual", "None", "a tensor like c", "pass what residual_scale is for");
  const Device on(op, c,
                  {Named("scale", scale), Named("shift", shift), Named("residual", residual),
                   Named("residual_scale", residual_scale), Named("residual_shift", residual_shift)});
  on.launch(BnAddReluForward{shape, c.const_data_ptr(), data(scale), data(shift), untyped(residual),
                             data(residual_scale), data(residual_shift), relu, y.mutable_data_ptr(),
                             written_bytes(mask)});
}

template <class Device>
std::tuple<Tensor, OptionalTensor> bn_add_relu_forward(Tensor c, Tensor scale, Tensor shift, OptionalTensor residual,
                                                       OptionalTensor residual_scale, OptionalTensor residual_shift,
                                                       bool relu, bool save_mask) {
  const char* op = "bn_add_relu_forward";
  const Shape shape = check_activation<Device>(op, "c", c);
  Tensor y = new_like(c);
  OptionalTensor mask;
  if (save_mask) mask = new_bytes(c, (c.numel() + 7) / 8);
  add_relu_forward<Device>(op, shape, c, scale, shift, residual, residual_scale, residual_shift, relu, y, mask);
  return {y, mask};
}

// The same, on the CPU, into y.
template <class Device>
OptionalTensor bn_add_relu_forward_out(Tensor c, Tensor scale, Tensor shift, OptionalTensor residual,
                                       OptionalTensor residual_scale, OptionalTensor residual_shift, bool relu,
                                       bool save_mask, Tensor y) {
  const char* op = "bn_add_relu_forward_out";
  const Shape shape = check_activation<Device>(op, "c", c);
  given_or_new(op, {"y", y}, c, {c.size(0), c.size(1), c.size(2), c.size(3)},
               {Named("c", c), Named("residual", residual)});
  OptionalTensor mask;
  if (save_mask) mask = new_bytes(c, (c.numel() + 7) / 8);
  add_relu_forward<Device>(op, shape, c, scale, shift, residual, residual_scale, residual_shift, relu, y, mask);
  return mask;
}

// Writes y into the storage of c.
template <class Device>
void bn_add_relu_forward_(Tensor c, Tensor scale, Tensor shift, OptionalTensor residual, OptionalTensor residual_scale,
                          OptionalTensor residual_shift, bool relu) {
  const char* op = "bn_add_relu_forward_";
  const Shape shape = check_activation<Device>(op, "c", c);
  add_relu_forward<Device>(op, shape, c, scale, shift, residual, residual_scale, residual_shift, relu, c, {});
}

template <class Device>
std::tuple<Tensor, Tensor, OptionalTensor> bn_add_relu_backward_reduce(Tensor dy, Tensor c, Tensor mean, Tensor scale,
                                                                       Tensor shift, OptionalTensor mask, bool relu,
                                                                       OptionalTensor shortcut_c,
                                                                       OptionalTensor shortcut_mean) {
  const char* op = "bn_add_relu_backward_reduce";
  const Shape shape = check_activation<Device>(op, "c", c);
  check_gradient(op, dy, c, scale, shift, mask, shape.channels);
  check_vector(op, "mean", mean, shape.channels);
  check_like(op, "shortcut_c", shortcut_c, c);
  check_vector(op, "shortcut_mean", shortcut_mean, shape.channels);
  check_together(op, "shortcut_c, shortcut_mean", shortcut_c.has_value(), shortcut_mean.has_value());
  const Device on(op, c,
                  {Named("dy", dy), Named("mean", mean), Named("scale", scale), Named("shift", shift),
                   Named("mask", mask), Named("shortcut_c", shortcut_c), Named("shortcut_mean", shortcut_mean)});
  Tensor sum = new_vector(c, shape.channels), centered = new_vector(c, shape.channels);
  OptionalTensor shortcut;
  if (shortcut_c) shortcut = new_vector(c, shape.channels);
  on.launch(BnAddReluBackwardReduce{shape, dy.const_data_ptr(), c.const_data_ptr(), byte_data(mask), relu, data(mean),
                                    data(scale), data(shift), untyped(shortcut_c), data(shortcut_mean), written(sum),
                                    written(centered), written(shortcut)});
  return {sum, centered, shortcut};
}

template <class Device>
std::tuple<Tensor, OptionalTensor, OptionalTensor> bn_backward_coefficients(Tensor sum_dz, Tensor sum_dz_centered,
                                                                            Tensor mean, Tensor invstd, Tensor scale,
                                                                            int64_t rows, bool training) {
  const char* op = "bn_backward_coefficients";
  const int64_t channels = sum_dz.numel();
  // rows is the number of positions that were summed over: 0 for an empty batch
  if (rows < 0) fail(op, "rows", std::to_string(rows), "N*H*W", "pass the number of positions of c");
  check_device(op, "sum_dz", sum_dz, Device::kCuda);
  check_vector(op, "sum_dz", sum_dz, channels);
  check_vector(op, "sum_dz_centered", sum_dz_centered, channels);
  check_vector(op, "mean", mean, channels);
  check_vector(op, "invstd", invstd, channels);
  check_vector(op, "scale", scale, channels);
  const Device on(
      op, sum_dz,
      {Named("sum_dz_centered", sum_dz_centered), Named("mean", mean), Named("invstd", invstd), Named("scale", scale)});
  Tensor dweight = new_vector(mean, channels);
  OptionalTensor b, k;
  if (training) {
    b = new_vector(mean, channels);
    k = new_vector(mean, channels);
  }
  on.launch(BnBackwardCoefficients{channels, rows, data(sum_dz), data(sum_dz_centered), data(mean), data(invstd),
                                   data(scale), written(dweight), written(b), written(k)});
  return {dweight, b, k};
}

// Checks all arguments but c, and writes dc, and dresidual if there is one. In place, dc is dy or c, and dresidual is
// shortcut_c.
template <class Device>
void backward_input(const char* op, const Shape& shape, const Tensor& dy, const Tensor& c, const Tensor& scale,
                    const Tensor& shift, const Tensor& a, const OptionalTensor& b, const OptionalTensor& k,
                    const OptionalTensor& mask, bool relu, const OptionalTensor& shortcut_c,
                    const OptionalTensor& shortcut_a, const OptionalTensor& shortcut_b,
                    const OptionalTensor& shortcut_k, const Tensor& dc, const OptionalTensor& dresidual) {
  check_gradient(op, dy, c, scale, shift, mask, shape.channels);
  const Coefficients grads = check_coefficients(op, a, b, k, shape.channels);
  check_like(op, "shortcut_c", shortcut_c, c);
  const Coefficients shortcut_grads = check_coefficients(op, shortcut_a, shortcut_b, shortcut_k, shape.channels);
  check_together(op, "shortcut_c, shortcut_A", shortcut_c.has_value(), shortcut_a.has_value());
  const Device on(op, c,
                  {Named("dy", dy), Named("scale", scale), Named("shift", shift), Named("A", a), Named("B", b),
                   Named("K", k), Named("mask", mask), Named("shortcut_c", shortcut_c), Named("shortcut_A", shortcut_a),
                   Named("shortcut_B", shortcut_b), Named("shortcut_K", shortcut_k)});
  on.launch(BnAddReluBackwardInput{shape, dy.const_data_ptr(), c.const_data_ptr(), byte_data(mask), relu, data(scale),
                                   data(shift), grads, untyped(shortcut_c), shortcut_grads, dc.mutable_data_ptr(),
                                   untyped_written(dresidual)});
}

template <class Device>
std::tuple<Tensor, OptionalTensor> bn_add_relu_backward_input(Tensor dy, Tensor c, Tensor scale, Tensor shift, Tensor a,
                                                              OptionalTensor b, OptionalTensor k, OptionalTensor mask,
                                                              bool relu, OptionalTensor shortcut_c,
                                                              OptionalTensor shortcut_a, OptionalTensor shortcut_b,
                                                              OptionalTensor shortcut_k, bool save_dz) {
  const char* op = "bn_add_relu_backward_input";
  const Shape shape = check_activation<Device>(op, "c", c);
  Tensor dc = new_like(c);
  OptionalTensor dresidual;
  if (shortcut_c || save_dz) dresidual = new_like(c);
  backward_input<Device>(op, shape, dy, c, scale, shift, a, b, k, mask, relu, shortcut_c, shortcut_a, shortcut_b,
                         shortcut_k, dc, dresidual);
  return {dc, dresidual};
}

// Writes dc into the storage of dy. There is no second result.
template <class Device>
void bn_add_relu_backward_input_(Tensor dy, Tensor c, Tensor scale, Tensor shift, Tensor a, OptionalTensor b,
                                 OptionalTensor k, OptionalTensor mask, bool relu) {
  const char* op = "bn_add_relu_backward_input_";
  const Shape shape = check_activation<Device>(op, "c", c);
  backward_input<Device>(op, shape, dy, c, scale, shift, a, b, k, mask, relu, {}, {}, {}, {}, dy, {});
}

// Writes dc into the storage of c, and the gradient of a projection into the storage of shortcut_c.
template <class Device>
OptionalTensor bn_add_relu_backward_input_of_c_(Tensor dy, Tensor c, Tensor scale, Tensor shift, Tensor a,
                                                OptionalTensor b, OptionalTensor k, OptionalTensor mask, bool relu,
                                                OptionalTensor shortcut_c, OptionalTensor shortcut_a,
                                                OptionalTensor shortcut_b, OptionalTensor shortcut_k, bool save_dz) {
  const char* op = "bn_add_relu_backward_input_of_c_";
  const Shape shape = check_activation<Device>(op, "c", c);
  OptionalTensor dz;
  if (save_dz && !shortcut_c) dz = new_like(c);
  backward_input<Device>(op, shape, dy, c, scale, shift, a, b, k, mask, relu, shortcut_c, shortcut_a, shortcut_b,
                         shortcut_k, c, shortcut_c ? shortcut_c : dz);
  return dz;
}

template <class Device>
Tensor relu_backward(Tensor dy, Tensor mask) {
  const char* op = "relu_backward";
  const Shape shape = check_activation<Device>(op, "dy", dy);
  check_mask(op, mask, dy);
  const Device on(op, dy, {Named("mask", mask)});
  Tensor dz = new_like(dy);
  on.launch(ReluBackward{shape.dtype, dy.numel(), dy.const_data_ptr(), byte_data(mask), dz.mutable_data_ptr()});
  return dz;
}

template <class Device>
void register_ops(DeviceOps& m) {
  m.impl<&bn_stats<Device>>("bn_stats");
  m.impl<&bn_scale_shift<Device>>("bn_scale_shift");
  m.impl<&bn_add_relu_forward<Device>>("bn_add_relu_forward");
  m.impl<&bn_add_relu_backward_reduce<Device>>("bn_add_relu_backward_reduce");
  m.impl<&bn_backward_coefficients<Device>>("bn_backward_coefficients");
  m.impl<&bn_add_relu_backward_input<Device>>("bn_add_relu_backward_input");
  m.impl<&relu_backward<Device>>("relu_backward");
}

}  // namespace

}  // namespace fusedres::front

FUSEDRES_OPS(CPU, m) {
  using namespace fusedres::front;
  register_ops<Cpu>(m);
  m.impl<&bn_add_relu_forward_<Cpu>>("bn_add_relu_forward_");
  m.impl<&bn_add_relu_forward_out<Cpu>>("bn_add_relu_forward_out");
  m.impl<&bn_add_relu_backward_input_<Cpu>>("bn_add_relu_backward_input_");
  m.impl<&bn_add_relu_backward_input_of_c_<Cpu>>("bn_add_relu_backward_input_of_c_");
}

#ifdef USE_CUDA
FUSEDRES_OPS(CUDA, m) { fusedres::front::register_ops<fusedres::front::Cuda>(m); }
#endif
