// Uninitialised results, made by torch's C functions. torch::stable::empty goes through the dispatcher, which takes as
// long as a small kernel.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fusedres::front {

using torch::stable::Tensor;

inline int32_t dtype_code(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// A tensor on like's device.
inline Tensor new_strided(const Tensor& like, int64_t dims, const int64_t* sizes, const int64_t* strides,
                          int32_t dtype) {
  int32_t device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, device, index, &made));
  return Tensor(made);
}

// [length] on like's device
inline Tensor new_1d(const Tensor& like, int64_t length, int32_t dtype) {
  const int64_t stride = 1;
  return new_strided(like, 1, &length, &stride, dtype);
}
inline Tensor new_vector(const Tensor& like, int64_t channels) {
  return new_1d(like, channels, aoti_torch_dtype_float32());
}
inline Tensor new_bytes(const Tensor& like, int64_t bytes) { return new_1d(like, bytes, aoti_torch_dtype_uint8()); }

// A tensor with the sizes, strides and dtype of c [N, C, H, W], which is dense.
inline Tensor new_like(const Tensor& c) {
  const int64_t sizes[] = {c.size(0), c.size(1), c.size(2), c.size(3)};
  const int64_t strides[] = {c.stride(0), c.stride(1), c.stride(2), c.stride(3)};
  return new_strided(c, 4, sizes, strides, dtype_code(c));
}

// [N, channels, height, width] in channels_last, on like's device
inline Tensor new_channels_last(const Tensor& like, int64_t batch, int64_t channels, int64_t height, int64_t width,
                                int32_t dtype) {
  const int64_t sizes[] = {batch, channels, height, width};
  const int64_t strides[] = {height * width * channels, 1, width * channels, channels};
  return new_strided(like, 4, sizes, strides, dtype);
}

}  // namespace fusedres::front
