// Where some tensors lie and what they are like, which Python knows by a number.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fusedres::front {

// Whether tensors from `first` on are strided and lie where those of the list did; their forms are not looked at.
bool lie_at(int64_t places, const std::vector<torch::stable::Tensor>& tensors, size_t first);

}  // namespace fusedres::front
