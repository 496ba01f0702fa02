// Two of the ops of bn.cpp at once, where the second one's vectors are formed from what the first one sums: on CUDA the
// last block of the first one's launch forms them. A replay calls these; both results are bitwise those of the two ops.
#include "allocate.h"
#include "device_ops.h"
#include "devices.h"

namespace fusedres::front {

namespace {

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_stats_scale_shift(Tensor c, OptionalTensor weight,
                                                                        OptionalTensor bias, double eps) {
  const char* op = "bn_stats_scale_shift";
  const Shape shape = check_activation<Device>(op, "c", c);
  const int64_t channels = shape.channels;
  const Device on(op, c, {Named("weight", weight), Named("bias", bias)});
  const Parameter w = Device::parameter_of(op, "weight", weight, channels);
  const Parameter b = Device::parameter_of(op, "bias", bias, channels);
  Tensor mean = new_vector(c, channels), var = new_vector(c, channels);
  Tensor invstd = new_vector(c, channels), scale = new_vector(c, channels), shift = new_vector(c, channels);
  BnStats stats{shape, c.const_data_ptr(), written(mean), written(var)};
  const BnScaleShift vectors{channels,        data(mean),     data(var),     w, b, eps,
                             written(invstd), written(scale), written(shift)};
  if (Device::kCuda) stats.scale_shift = vectors;
  on.launch(stats);
  if (!Device::kCuda) on.launch(vectors);
  return {mean, var, invstd, scale, shift};
}

// What bn_backward_coefficients gives, allocated: dweight, and in training B and K.
struct NewCoefficients {
  NewCoefficients(const Tensor& like, int64_t channels, bool training) : dweight(new_vector(like, channels)) {
    if (!training) return;
    b = new_vector(like, channels);
    k = new_vector(like, channels);
  }

  BnBackwardCoefficients args(int64_t channels, int64_t rows, const Tensor& sum_dz, const Tensor& centered,
                              const Tensor& mean, const Tensor& invstd, const Tensor& scale) const {
    return {channels,     rows,        data(sum_dz),     data(centered), data(mean),
            data(invstd), data(scale), written(dweight), written(b),     written(k)};
  }

  Tensor dweight;
  OptionalTensor b, k;
};

using Reduced = std::tuple<Tensor, Tensor, OptionalTensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor,
                           OptionalTensor, OptionalTensor>;

// rows: as of bn_backward_coefficients. The shortcut's coefficients are formed where its invstd is given.
template <class Device>
Reduced bn_add_relu_backward_reduce_coefficients(Tensor dy, Tensor c, Tensor mean, Tensor scale, Tensor shift,
                                                 OptionalTensor mask, bool relu, OptionalTensor shortcut_c,
                                                 OptionalTensor shortcut_mean, Tensor invstd, int64_t rows,
                                                 bool training, OptionalTensor shortcut_invstd,
                                                 OptionalTensor shortcut_scale, bool shortcut_training) {
  const char* op = "bn_add_relu_backward_reduce_coefficients";
  const Shape shape = check_activation<Device>(op, "c", c);
  const int64_t channels = shape.channels;
  if (rows < 0) fail(op, "rows", std::to_string(rows), "N*H*W", "pass the number of positions of c");
  check_gradient(op, dy, c, scale, shift, mask, channels);
  check_vector(op, "mean", mean, channels);
  check_vector(op, "invstd", invstd, channels);
  check_like(op, "shortcut_c", shortcut_c, c);
  check_vector(op, "shortcut_mean", shortcut_mean, channels);
  check_vector(op, "shortcut_invstd", shortcut_invstd, channels);
  check_vector(op, "shortcut_scale", shortcut_scale, channels);
  check_together(op, "shortcut_c, shortcut_mean", shortcut_c.has_value(), shortcut_mean.has_value());
  check_together(op, "shortcut_invstd, shortcut_scale", shortcut_invstd.has_value(), shortcut_scale.has_value());
  if (shortcut_invstd && !shortcut_c) fail(op, "shortcut_c", "None", "a tensor like c", "pass what its BN is of");
  const Device on(
      op, c,
      {Named("dy", dy), Named("mean", mean), Named("scale", scale), Named("shift", shift), Named("mask", mask),
       Named("invstd", invstd), Named("shortcut_c", shortcut_c), Named("shortcut_mean", shortcut_mean),
       Named("shortcut_invstd", shortcut_invstd), Named("shortcut_scale", shortcut_scale)});
  Tensor sum = new_vector(c, channels), centered = new_vector(c, channels);
  OptionalTensor shortcut;
  if (shortcut_c) shortcut = new_vector(c, channels);
  BnAddReluBackwardReduce reduce{
      shape,        dy.const_data_ptr(), c.const_data_ptr(), byte_data(mask),     relu,
      data(mean),   data(scale),         data(shift),        untyped(shortcut_c), data(shortcut_mean),
      written(sum), written(centered),   written(shortcut)};
  const NewCoefficients own(c, channels, training);
  const auto args = own.args(channels, rows, sum, centered, mean, invstd, scale);
  std::optional<NewCoefficients> other;
  BnBackwardCoefficients shortcut_args{};
  if (shortcut_invstd) {
    other.emplace(c, channels, shortcut_training);
    shortcut_args = other->args(channels, rows, sum, *shortcut, *shortcut_mean, *shortcut_invstd, *shortcut_scale);
  }
  if (Device::kCuda) {
    reduce.coefficients = args;
    reduce.shortcut_coefficients = shortcut_args;
  }
  on.launch(reduce);
  if (!Device::kCuda) {
    on.launch(args);
    if (other) on.launch(shortcut_args);
  }
  OptionalTensor dweight, b, k;
  if (other) dweight = other->dweight, b = other->b, k = other->k;
  return {sum, centered, shortcut, own.dweight, own.b, own.k, dweight, b, k};
}

template <class Device>
void register_ops(DeviceOps& m) {
  m.impl<&bn_stats_scale_shift<Device>>("bn_stats_scale_shift");
  m.impl<&bn_add_relu_backward_reduce_coefficients<Device>>("bn_add_relu_backward_reduce_coefficients");
}

}  // namespace

}  // namespace fusedres::front

FUSEDRES_OPS(CPU, m) { fusedres::front::register_ops<fusedres::front::Cpu>(m); }

#ifdef USE_CUDA
FUSEDRES_OPS(CUDA, m) { fusedres::front::register_ops<fusedres::front::Cuda>(m); }
#endif
