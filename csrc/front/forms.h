// What a tensor is like, for recordings and for whoever asks whether a tensor is as it was.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace fusedres::front {

// What an input must be like, or an allocated tensor is like.
struct Form {
  int32_t dtype, device, device_index;
  bool aligned;  // whether the first element lies at a multiple of 16 bytes: asked of inputs alone
  std::vector<int64_t> sizes, strides;
};

// t: strided
bool matches(const Form& form, const torch::stable::Tensor& t);
Form form_of(const torch::stable::Tensor& t);

}  // namespace fusedres::front
