// fusedres_native on CUDA: checks the arguments, allocates the results, calls the launchers of cuda/.
//
// cudart is linked statically and nothing of libtorch_cuda is: the library loads with a CPU-only torch too. The
// current stream comes from libtorch_cuda, looked up at the first launch.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <optional>

#include "allocate.h"
#include "checks.h"
#include "cuda/launchers.h"
#include "cuda_archs.h"

namespace fusedres::cuda {

namespace {

void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would be blamed for it
  throw std::runtime_error(std::string("fusedres ") + op + ": the CUDA launch failed: " + cudaGetErrorString(error) +
                           ". Check earlier kernels with CUDA_LAUNCH_BLOCKING=1, or use backend='triton'.");
}

using CurrentStream = AOTITorchError (*)(int32_t, void**);

// Null: torch is no CUDA build, or older than 2.10.
CurrentStream find_current_stream() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = torch_cuda == nullptr ? nullptr : dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<CurrentStream>(symbol);
}

cudaError_t compute_capability(int device, int* major, int* minor) {
  const cudaError_t error = cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(minor, cudaDevAttrComputeCapabilityMinor, device);
}

// An argument by its name; null: absent.
struct Named {
  Named(const char* name, const Tensor& t) : name(name), tensor(&t) {}
  Named(const char* name, const OptionalTensor& t) : name(name), tensor(t ? &*t : nullptr) {}
  const char* name;
  const Tensor* tensor;
};

// Within its scope the tensor's device is current; `stream` is torch's current stream there. The others must lie there.
class OnDevice {
 public:
  OnDevice(const char* op, const Tensor& t, std::initializer_list<Named> others = {}) : op_(op) {
    for (const Named& other : others) {
      if (other.tensor == nullptr || same_device(t, *other.tensor)) continue;
      fail(op, other.name, "on another device", "every argument on the device of the first", "move it there");
    }
    const int device = t.get_device_index();
    check_runs_on(device);
    int current = -1;
    check_launch(op, cudaGetDevice(&current));
    if (device != current) guard_.emplace(device);  // torch's: it makes no context where it goes back to
    static const CurrentStream current_stream = find_current_stream();
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(current_stream(device, &handle));
    stream = static_cast<cudaStream_t>(handle);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream = nullptr;

 private:
  // Before a device's first launch: our error instead of "no kernel image is available".
  void check_runs_on(int device) {
    static thread_local int checked = -1;
    if (device == checked) return;
    const std::string problem = cuda_device_problem(device);
    if (!problem.empty()) {
      throw std::runtime_error(std::string("fusedres ") + op_ + ": this library does not run on CUDA device " +
                               std::to_string(device) + ": " + problem +
                               ". Install a wheel for it, or use backend='triton'.");
    }
    checked = device;
  }

  const char* op_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

Dtype dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Float: return Dtype::kFloat32;
    default:
      fail(op, name, dtype_name(t.scalar_type()), "float16, bfloat16 or float32",
           "convert it, or use backend='reference'");
  }
}

void check_activation(const char* op, const char* name, const Tensor& c) {
  check_device(op, name, c, true);
  check_channels_last(op, name, c);
  dtype_of(op, name, c);
  if (c.size(1) == 0) fail(op, name, sizes_of(c), "at least one channel", "use backend='reference'");
}

Shape shape_of(const Tensor& c) { return {dtype_of("", "c", c), c.numel() / c.size(1), c.size(1)}; }

const float* data(const Tensor& v) { return v.const_data_ptr<float>(); }
const float* data(const OptionalTensor& v) { return v ? data(*v) : nullptr; }
const uint8_t* mask_data(const OptionalTensor& v) { return v ? v->const_data_ptr<uint8_t>() : nullptr; }
const void* untyped(const OptionalTensor& v) { return v ? v->const_data_ptr() : nullptr; }
void* untyped_written(const OptionalTensor& v) { return v ? v->mutable_data_ptr() : nullptr; }
float* written(const Tensor& v) { return v.mutable_data_ptr<float>(); }
float* written(const OptionalTensor& v) { return v ? written(*v) : nullptr; }

// Scratch from torch's allocator: given back at once, reused only by later work of this stream.
struct Scratch {
  Scratch(const Tensor& like, size_t bytes)
      : tensor(new_bytes(like, static_cast<int64_t>(bytes))), bytes(bytes) {}
  Workspace get() const { return {tensor.mutable_data_ptr(), bytes, false}; }
  Tensor tensor;
  size_t bytes;
};

Parameter parameter_of(const char* op, const char* name, const OptionalTensor& v, int64_t channels) {
  if (!v) return {nullptr, Dtype::kFloat32};
  if (v->dim() != 1 || v->size(0) != channels || !v->is_contiguous()) {
    fail(op, name, layout_of(*v), "contiguous [" + std::to_string(channels) + "]", "pass one value a channel");
  }
  check_device(op, name, *v, true);
  return {v->const_data_ptr(), v->scalar_type() == ScalarType::Double ? Dtype::kFloat64 : dtype_of(op, name, *v)};
}

Coefficients coefficients_of(const char* op, const OptionalTensor& a, const OptionalTensor& b,
                             const OptionalTensor& k, int64_t channels) {
  check_vector(op, "A", a, channels);
  check_vector(op, "B", b, channels);
  check_vector(op, "K", k, channels);
  check_together(op, "B, K", b.has_value(), k.has_value());
  return {data(a), data(b), data(k)};
}

Pooling pooling_of(const char* op, const Tensor& c, int64_t kernel_size, int64_t stride, int64_t padding) {
  check_window(op, c, kernel_size, stride, padding);
  return {dtype_of(op, "c", c), c.size(0), c.size(2), c.size(3), c.size(1),
          static_cast<int>(kernel_size), static_cast<int>(stride), static_cast<int>(padding)};
}

std::tuple<Tensor, Tensor> bn_stats_op(Tensor c) {
  const char* op = "bn_stats";
  check_activation(op, "c", c);
  const OnDevice on(op, c);
  const Shape shape = shape_of(c);
  Tensor mean = new_vector(c, shape.channels), var = new_vector(c, shape.channels);
  const Scratch scratch(c, bn_stats_workspace(shape));
  check_launch(op, bn_stats({shape, c.const_data_ptr(), written(mean), written(var), {}}, scratch.get(), on.stream));
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor> bn_scale_shift_op(Tensor mean, Tensor var, OptionalTensor weight,
                                                     OptionalTensor bias, double eps) {
  const char* op = "bn_scale_shift";
  const int64_t channels = mean.numel();
  check_device(op, "mean", mean, true);
  check_vector(op, "mean", mean, channels);
  check_vector(op, "var", var, channels);
  const OnDevice on(op, mean, {{"var", var}, {"weight", weight}, {"bias", bias}});
  Tensor invstd = new_vector(mean, channels), scale = new_vector(mean, channels), shift = new_vector(mean, channels);
  check_launch(op, bn_scale_shift({channels, data(mean), data(var), parameter_of(op, "weight", weight, channels),
                                   parameter_of(op, "bias", bias, channels), eps, written(invstd), written(scale),
                                   written(shift)},
                                  on.stream));
  return {invstd, scale, shift};
}

std::tuple<Tensor, OptionalTensor> bn_add_relu_forward_op(Tensor c, Tensor scale, Tensor shift,
                                                          OptionalTensor residual, OptionalTensor residual_scale,
                                                          OptionalTensor residual_shift, bool relu, bool save_mask) {
  const char* op = "bn_add_relu_forward";
  check_activation(op, "c", c);
  const Shape shape = shape_of(c);
  check_vector(op, "scale", scale, shape.channels);
  check_vector(op, "shift", shift, shape.channels);
  check_like(op, "residual", residual, c);
  check_vector(op, "residual_scale", residual_scale, shape.channels);
  check_vector(op, "residual_shift", residual_shift, shape.channels);
  check_together(op, "residual_scale, residual_shift", residual_scale.has_value(), residual_shift.has_value());
  if (residual_scale && !residual) fail(op, "residual", "None", "a tensor like c", "pass what residual_scale is for");
  const OnDevice on(op, c, {{"scale", scale}, {"shift", shift}, {"residual", residual},
                            {"residual_scale", residual_scale}, {"residual_shift", residual_shift}});
  Tensor y = new_like(c);
  OptionalTensor mask;
  if (save_mask) mask = new_bytes(c, (c.numel() + 7) / 8);
  check_launch(op, bn_add_relu_forward({shape, c.const_data_ptr(), data(scale), data(shift), untyped(residual),
                                        data(residual_scale), data(residual_shift), relu, y.mutable_data_ptr(),
                                        static_cast<uint8_t*>(untyped_written(mask))},
                                       on.stream));
  return {y, mask};
}

void check_gradients(const char* op, const Tensor& dy, const Tensor& c, const Tensor& scale, const Tensor& shift,
                     const OptionalTensor& mask) {
  check_activation(op, "c", c);
  check_like(op, "dy", dy, c);
  check_vector(op, "scale", scale, c.size(1));
  check_vector(op, "shift", shift, c.size(1));
  check_mask(op, mask, c);
}

std::tuple<Tensor, Tensor, OptionalTensor> bn_add_relu_backward_reduce_op(Tensor dy, Tensor c, Tensor mean,
                                                                          Tensor scale, Tensor shift,
                                                                          OptionalTensor mask, bool relu,
                                                                          OptionalTensor shortcut_c,
                                                                          OptionalTensor shortcut_mean) {
  const char* op = "bn_add_relu_backward_reduce";
  check_gradients(op, dy, c, scale, shift, mask);
  const Shape shape = shape_of(c);
  check_vector(op, "mean", mean, shape.channels);
  check_like(op, "shortcut_c", shortcut_c, c);
  check_vector(op, "shortcut_mean", shortcut_mean, shape.channels);
  check_together(op, "shortcut_c, shortcut_mean", shortcut_c.has_value(), shortcut_mean.has_value());
  const OnDevice on(op, c, {{"dy", dy}, {"mean", mean}, {"scale", scale}, {"shift", shift}, {"mask", mask},
                            {"shortcut_c", shortcut_c}, {"shortcut_mean", shortcut_mean}});
  Tensor sum = new_vector(c, shape.channels), centered = new_vector(c, shape.channels);
  OptionalTensor shortcut;
  if (shortcut_c) shortcut = new_vector(c, shape.channels);
  const Scratch scratch(c, bn_add_relu_backward_reduce_workspace(shape));
  check_launch(op, bn_add_relu_backward_reduce(
                       {shape, dy.const_data_ptr(), c.const_data_ptr(), mask_data(mask), relu, data(mean), data(scale),
                        data(shift), untyped(shortcut_c), data(shortcut_mean), written(sum), written(centered),
                        written(shortcut), {}, {}},
                       scratch.get(), on.stream));
  return {sum, centered, shortcut};
}

std::tuple<Tensor, OptionalTensor, OptionalTensor> bn_backward_coefficients_op(Tensor sum_dz, Tensor sum_dz_centered,
                                                                               Tensor mean, Tensor invstd,
                                                                               Tensor scale, int64_t rows,
                                                                               bool training) {
  const char* op = "bn_backward_coefficients";
  const int64_t channels = sum_dz.numel();
  check_rows(op, rows);
  check_device(op, "sum_dz", sum_dz, true);
  check_vector(op, "sum_dz", sum_dz, channels);
  check_vector(op, "sum_dz_centered", sum_dz_centered, channels);
  check_vector(op, "mean", mean, channels);
  check_vector(op, "invstd", invstd, channels);
  check_vector(op, "scale", scale, channels);
  const OnDevice on(op, sum_dz, {{"sum_dz_centered", sum_dz_centered}, {"mean", mean}, {"invstd", invstd},
                                 {"scale", scale}});
  Tensor dweight = new_vector(mean, channels);
  OptionalTensor b, k;
  if (training) {
    b = new_vector(mean, channels);
    k = new_vector(mean, channels);
  }
  check_launch(op, bn_backward_coefficients({channels, rows, data(sum_dz), data(sum_dz_centered), data(mean),
                                             data(invstd), data(scale), written(dweight), written(b), written(k)},
                                            on.stream));
  return {dweight, b, k};
}

std::tuple<Tensor, OptionalTensor> bn_add_relu_backward_input_op(
    Tensor dy, Tensor c, Tensor scale, Tensor shift, Tensor a, OptionalTensor b, OptionalTensor k, OptionalTensor mask,
    bool relu, OptionalTensor shortcut_c, OptionalTensor shortcut_a, OptionalTensor shortcut_b,
    OptionalTensor shortcut_k, bool save_dz) {
  const char* op = "bn_add_relu_backward_input";
  check_gradients(op, dy, c, scale, shift, mask);
  const Shape shape = shape_of(c);
  const Coefficients main = coefficients_of(op, a, b, k, shape.channels);
  check_like(op, "shortcut_c", shortcut_c, c);
  const Coefficients shortcut = coefficients_of(op, shortcut_a, shortcut_b, shortcut_k, shape.channels);
  check_together(op, "shortcut_c, shortcut_A", shortcut_c.has_value(), shortcut_a.has_value());
  const OnDevice on(op, c, {{"dy", dy}, {"scale", scale}, {"shift", shift}, {"A", a}, {"B", b}, {"K", k},
                            {"mask", mask}, {"shortcut_c", shortcut_c}, {"shortcut_A", shortcut_a},
                            {"shortcut_B", shortcut_b}, {"shortcut_K", shortcut_k}});
  Tensor dc = new_like(c);
  OptionalTensor dresidual;
  if (shortcut_c || save_dz) dresidual = new_like(c);
  check_launch(op, bn_add_relu_backward_input({shape, dy.const_data_ptr(), c.const_data_ptr(), mask_data(mask), relu,
                                               data(scale), data(shift), main, untyped(shortcut_c), shortcut,
                                               dc.mutable_data_ptr(), untyped_written(dresidual)},
                                              on.stream));
  return {dc, dresidual};
}

Tensor relu_backward_op(Tensor dy, Tensor mask) {
  const char* op = "relu_backward";
  check_activation(op, "dy", dy);
  check_mask(op, mask, dy);
  const OnDevice on(op, dy, {{"mask", mask}});
  Tensor dz = new_like(dy);
  check_launch(op, relu_backward({dtype_of(op, "dy", dy), dy.numel(), dy.const_data_ptr(),
                                  mask.const_data_ptr<uint8_t>(), dz.mutable_data_ptr()},
                                 on.stream));
  return dz;
}

// forms the indices whether they are asked for or not
std::tuple<Tensor, OptionalTensor> bn_relu_maxpool_forward_op(Tensor c, Tensor scale, Tensor shift,
                                                              int64_t kernel_size, int64_t stride, int64_t padding,
                                                              bool save_indices) {
  const char* op = "bn_relu_maxpool_forward";
  check_activation(op, "c", c);
  const Pooling pooling = pooling_of(op, c, kernel_size, stride, padding);
  check_vector(op, "scale", scale, pooling.channels);
  check_vector(op, "shift", shift, pooling.channels);
  const OnDevice on(op, c, {{"scale", scale}, {"shift", shift}});
  const int64_t height = pooling.pooled_height, width = pooling.pooled_width;
  Tensor y = new_channels_last(c, c.size(0), pooling.channels, height, width, dtype_code(c));
  Tensor indices = new_channels_last(c, c.size(0), pooling.channels, height, width, aoti_torch_dtype_uint8());
  check_launch(op, bn_relu_maxpool_forward({pooling, c.const_data_ptr(), data(scale), data(shift),
                                            y.mutable_data_ptr(), indices.mutable_data_ptr<uint8_t>()},
                                           on.stream));
  return {y, save_indices ? OptionalTensor(indices) : std::nullopt};
}

std::tuple<Tensor, Tensor> bn_relu_maxpool_backward_reduce_op(Tensor dy, Tensor indices, Tensor c, Tensor mean,
                                                              int64_t kernel_size, int64_t stride, int64_t padding) {
  const char* op = "bn_relu_maxpool_backward_reduce";
  check_activation(op, "c", c);
  const Pooling pooling = pooling_of(op, c, kernel_size, stride, padding);
  check_pooled(op, dy, indices, c, pooling.pooled_height, pooling.pooled_width);
  check_vector(op, "mean", mean, pooling.channels);
  const OnDevice on(op, c, {{"dy", dy}, {"indices", indices}, {"mean", mean}});
  Tensor sum = new_vector(c, pooling.channels), centered = new_vector(c, pooling.channels);
  const Scratch scratch(c, bn_relu_maxpool_backward_reduce_workspace(pooling));
  check_launch(op, bn_relu_maxpool_backward_reduce({pooling, dy.const_data_ptr(), indices.const_data_ptr<uint8_t>(),
                                                    c.const_data_ptr(), data(mean), written(sum), written(centered),
                                                    {}},
                                                   scratch.get(), on.stream));
  return {sum, centered};
}

Tensor bn_relu_maxpool_backward_input_op(Tensor dy, Tensor indices, Tensor c, Tensor a, OptionalTensor b,
                                         OptionalTensor k, int64_t kernel_size, int64_t stride, int64_t padding) {
  const char* op = "bn_relu_maxpool_backward_input";
  check_activation(op, "c", c);
  const Pooling pooling = pooling_of(op, c, kernel_size, stride, padding);
  check_pooled(op, dy, indices, c, pooling.pooled_height, pooling.pooled_width);
  const Coefficients main = coefficients_of(op, a, b, k, pooling.channels);
  const OnDevice on(op, c, {{"dy", dy}, {"indices", indices}, {"A", a}, {"B", b}, {"K", k}});
  Tensor dc = new_like(c);
  check_launch(op, bn_relu_maxpool_backward_input({pooling, dy.const_data_ptr(), indices.const_data_ptr<uint8_t>(),
                                                   c.const_data_ptr(), main, dc.mutable_data_ptr()},
                                                  on.stream));
  return dc;
}

}  // namespace

}  // namespace fusedres::cuda

namespace fusedres {

int64_t cuda_version() { return CUDART_VERSION; }

std::string cuda_device_problem(int device) {
  int major = 0, minor = 0;
  const cudaError_t error = cuda::compute_capability(device, &major, &minor);
  if (error != cudaSuccess) {
    cudaGetLastError();  // an error that is kept would be taken for the next launch's
    return "its CUDA " + std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) +
           " says: " + cudaGetErrorString(error);
  }
  if (!archs_cover(cuda_archs(), major, minor)) {
    return "it holds code for " + cuda_archs() + ", needed sm_" + std::to_string(major * 10 + minor);
  }
  if (cuda::find_current_stream() == nullptr) return "it needs a CUDA build of torch >= 2.10";
  return "";
}

}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CUDA, m) {
  using namespace fusedres::cuda;
  m.impl("bn_stats", TORCH_BOX(&bn_stats_op));
  m.impl("bn_scale_shift", TORCH_BOX(&bn_scale_shift_op));
  m.impl("bn_add_relu_forward", TORCH_BOX(&bn_add_relu_forward_op));
  m.impl("bn_add_relu_backward_reduce", TORCH_BOX(&bn_add_relu_backward_reduce_op));
  m.impl("bn_backward_coefficients", TORCH_BOX(&bn_backward_coefficients_op));
  m.impl("bn_add_relu_backward_input", TORCH_BOX(&bn_add_relu_backward_input_op));
  m.impl("relu_backward", TORCH_BOX(&relu_backward_op));
  m.impl("bn_relu_maxpool_forward", TORCH_BOX(&bn_relu_maxpool_forward_op));
  m.impl("bn_relu_maxpool_backward_reduce", TORCH_BOX(&bn_relu_maxpool_backward_reduce_op));
  m.impl("bn_relu_maxpool_backward_input", TORCH_BOX(&bn_relu_maxpool_backward_input_op));
}
