// BN, ReLU and max-pooling: each op checks its arguments, allocates its results and calls the device's launcher.
#include <algorithm>

#include "allocate.h"
#include "device_ops.h"
#include "devices.h"
#include "results.h"

namespace fusedres::front {

namespace {

// The pooling of c [N, C, H, W]. Fails where the kernels do not take the window, or c holds no window.
Pooling pooling_of(const char* op, const Tensor& c, const Shape& shape, int64_t kernel_size, int64_t stride,
                   int64_t padding) {
  const bool taken = kernel_size >= 1 && kernel_size <= 15 && stride >= 1 && padding >= 0 && padding <= kernel_size / 2;
  const int64_t height = c.size(2), width = c.size(3);
  // A stride as long as the padded image leaves one window on each axis, and so does every longer stride.
  const int64_t step = taken ? std::min(stride, std::max(height, width) + 2 * padding) : stride;
  if (!taken || step > INT32_MAX) {
    std::ostringstream found;
    found << "kernel_size " << kernel_size << ", stride " << stride << ", padding " << padding;
    fail(op, "the window", found.str(), "kernel_size 1 to 15, stride >= 1, padding <= kernel_size/2",
         "use backend='reference'");
  }
  if (height + 2 * padding < kernel_size || width + 2 * padding < kernel_size) {
    fail(op, "c", sizes_of(c), "at least one window", "pass a larger image");
  }
  return {shape.dtype, c.size(0), height, width, shape.channels, int(kernel_size), int(step), int(padding)};
}

// dy and indices have the pooled size of c.
void check_pooled(const char* op, const Tensor& dy, const Tensor& indices, const Tensor& c, const Pooling& pooling) {
  check_channels_last(op, "dy", dy);
  check_device(op, "dy", dy, c.is_cuda());
  check_like(op, "indices", indices, dy, ScalarType::Byte);
  if (dy.scalar_type() != c.scalar_type()) {
    fail(op, "dy", dtype_name(dy.scalar_type()), dtype_name(c.scalar_type()), "pass tensors of one dtype");
  }
  if (dy.size(0) != pooling.batch || dy.size(1) != pooling.channels || dy.size(2) != pooling.pooled_height ||
      dy.size(3) != pooling.pooled_width) {
    fail(op, "dy", sizes_of(dy), "the shape of the pooled output", "pass the gradient of y");
  }
}

template <class Device>
std::tuple<Tensor, OptionalTensor> bn_relu_maxpool_forward(Tensor c, Tensor scale, Tensor shift, int64_t kernel_size,
                                                           int64_t stride, int64_t padding, bool save_indices) {
  const char* op = "bn_relu_maxpool_forward";
  const Shape shape = check_activation<Device>(op, "c", c);
  const Pooling pooling = pooling_of(op, c, shape, kernel_size, stride, padding);
  check_vector(op, "scale", scale, shape.channels);
  check_vector(op, "shift", shift, shape.channels);
  const Device on(op, c, {Named("scale", scale), Named("shift", shift)});
  const auto make = [&](int32_t dtype) {
    return new_channels_last(c, pooling.batch, pooling.channels, pooling.pooled_height, pooling.pooled_width, dtype);
  };
  Tensor y = make(dtype_code(c));
  OptionalTensor indices;
  if (save_indices || Device::kFormsIndicesAlways) indices = make(aoti_torch_dtype_uint8());
  on.launch(BnReluMaxpoolForward{pooling, c.const_data_ptr(), data(scale), data(shift), y.mutable_data_ptr(),
                                 written_bytes(indices)});
  return {y, save_indices ? indices : std::nullopt};
}

template <class Device>
std::tuple<Tensor, Tensor> bn_relu_maxpool_backward_reduce(Tensor dy, Tensor indices, Tensor c, Tensor mean,
                                                           int64_t kernel_size, int64_t stride, int64_t padding) {
  const char* op = "bn_relu_maxpool_backward_reduce";
  const Shape shape = check_activation<Device>(op, "c", c);
  const Pooling pooling = pooling_of(op, c, shape, kernel_size, stride, padding);
  check_pooled(op, dy, indices, c, pooling);
  check_vector(op, "mean", mean, shape.channels);
  const Device on(op, c, {Named("dy", dy), Named("indices", indices), Named("mean", mean)});
  Tensor sum = new_vector(c, shape.channels), centered = new_vector(c, shape.channels);
  on.launch(BnReluMaxpoolBackwardReduce{pooling, dy.const_data_ptr(), byte_data(indices), c.const_data_ptr(),
                                        data(mean), written(sum), written(centered)});
  return {sum, centered};
}

// out: the tensor to write dc, like c, into, or none
template <class Device>
Tensor backward_input(const char* op, const Tensor& dy, const Tensor& indices, const Tensor& c, const Tensor& a,
                      const OptionalTensor& b, const OptionalTensor& k, int64_t kernel_size, int64_t stride,
                      int64_t padding, const OptionalTensor& out) {
  const Shape shape = check_activation<Device>(op, "c", c);
  const Pooling pooling = pooling_of(op, c, shape, kernel_size, stride, padding);
  check_pooled(op, dy, indices, c, pooling);
  const Coefficients grads = check_coefficients(op, a, b, k, shape.channels);
  const Device on(op, c, {Named("dy", dy), Named("indices", indices), Named("A", a), Named("B", b), Named("K", k)});
  Tensor dc =
      given_or_new(op, {"dc", out}, c, {c.size(0), c.size(1), c.size(2), c.size(3)}, {Named("c", c), Named("dy", dy)});
  on.launch(BnReluMaxpoolBackwardInput{pooling, dy.const_data_ptr(), byte_data(indices), c.const_data_ptr(), grads,
                                       dc.mutable_data_ptr()});
  return dc;
}

template <class Device>
Tensor bn_relu_maxpool_backward_input(Tensor dy, Tensor indices, Tensor c, Tensor a, OptionalTensor b, OptionalTensor k,
                                      int64_t kernel_size, int64_t stride, int64_t padding) {
  return backward_input<Device>("bn_relu_maxpool_backward_input", dy, indices, c, a, b, k, kernel_size, stride, padding,
                                {});
}

// The same, on the CPU, into dc.
template <class Device>
void bn_relu_maxpool_backward_input_out(Tensor dy, Tensor indices, Tensor c, Tensor a, OptionalTensor b,
                                        OptionalTensor k, int64_t kernel_size, int64_t stride, int64_t padding,
                                        Tensor dc) {
  backward_input<Device>("bn_relu_maxpool_backward_input_out", dy, indices, c, a, b, k, kernel_size, stride, padding,
                         dc);
}

template <class Device>
void register_ops(DeviceOps& m) {
  m.impl<&bn_relu_maxpool_forward<Device>>("bn_relu_maxpool_forward");
  m.impl<&bn_relu_maxpool_backward_reduce<Device>>("bn_relu_maxpool_backward_reduce");
  m.impl<&bn_relu_maxpool_backward_input<Device>>("bn_relu_maxpool_backward_input");
}

}  // namespace

}  // namespace fusedres::front

FUSEDRES_OPS(CPU, m) {
  using namespace fusedres::front;
  register_ops<Cpu>(m);
  m.impl<&bn_relu_maxpool_backward_input_out<Cpu>>("bn_relu_maxpool_backward_input_out");
}

#ifdef USE_CUDA
FUSEDRES_OPS(CUDA, m) { fusedres::front::register_ops<fusedres::front::Cuda>(m); }
#endif
