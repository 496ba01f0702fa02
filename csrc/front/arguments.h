// Turns tensors into the fields of a launcher's struct: pointers, shapes, coefficients. `Device` is Cpu or Cuda.
#pragma once

#include "../ops.h"
#include "checks.h"

namespace fusedres::front {

inline const float* data(const Tensor& v) { return v.const_data_ptr<float>(); }
inline const float* data(const OptionalTensor& v) { return v ? data(*v) : nullptr; }
inline const uint8_t* byte_data(const Tensor& v) { return v.const_data_ptr<uint8_t>(); }
inline const uint8_t* byte_data(const OptionalTensor& v) { return v ? byte_data(*v) : nullptr; }
inline const void* untyped(const OptionalTensor& v) { return v ? v->const_data_ptr() : nullptr; }
inline float* written(const Tensor& v) { return v.mutable_data_ptr<float>(); }
inline float* written(const OptionalTensor& v) { return v ? written(*v) : nullptr; }
inline uint8_t* written_bytes(const OptionalTensor& v) { return v ? v->mutable_data_ptr<uint8_t>() : nullptr; }
inline void* untyped_written(const OptionalTensor& v) { return v ? v->mutable_data_ptr() : nullptr; }

// The shape of an activation c [N, C, H, W]. Fails where the device's kernels do not take c.
template <class Device>
Shape check_activation(const char* op, const char* name, const Tensor& c) {
  Device::check_processor(op);
  check_device(op, name, c, Device::kCuda);
  check_channels_last(op, name, c);
  const Dtype dtype = Device::dtype_of(op, name, c);
  const int64_t channels = c.size(1);
  if (channels == 0) fail(op, name, sizes_of(c), "at least one channel", "use backend='reference'");
  return {dtype, c.numel() / channels, channels};
}

// The coefficients of an input gradient, checked, each [channels].
inline Coefficients check_coefficients(const char* op, const OptionalTensor& a, const OptionalTensor& b,
                                       const OptionalTensor& k, int64_t channels) {
  check_vector(op, "A", a, channels);
  check_vector(op, "B", b, channels);
  check_vector(op, "K", k, channels);
  check_together(op, "B, K", b.has_value(), k.has_value());
  return {data(a), data(b), data(k)};
}

// Checks the tensors, apart from c, that dz is formed from.
inline void check_gradient(const char* op, const Tensor& dy, const Tensor& c, const Tensor& scale, const Tensor& shift,
                           const OptionalTensor& mask, int64_t channels) {
  check_like(op, "dy", dy, c);
  check_vector(op, "scale", scale, channels);
  check_vector(op, "shift", shift, channels);
  check_mask(op, mask, c);
}

// An argument and its name. The tensor is null where the argument is absent.
struct Named {
  Named(const char* name, const Tensor& t) : name(name), tensor(&t) {}
  Named(const char* name, const OptionalTensor& t) : name(name), tensor(t ? &*t : nullptr) {}
  const char* name;
  const Tensor* tensor;
};

}  // namespace fusedres::front
