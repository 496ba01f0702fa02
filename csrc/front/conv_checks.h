// Checks of arguments that the ops of convolutions share.
#pragma once

#include <array>
#include <initializer_list>

#include "allocate.h"
#include "arguments.h"

namespace fusedres::front {

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const Tensor& other) {
  if (t.scalar_type() == other.scalar_type()) return;
  fail(op, name, dtype_name(t.scalar_type()), dtype_name(other.scalar_type()), "pass tensors of one dtype");
}

// Checks x, and the weight [Cout, Cin, kernel, kernel] of a convolution that sums over x's channels: they are the
// weight's dimension `summed`.
template <class Device>
Shape check_weight(const char* op, const char* name, const Tensor& x, const Tensor& weight, int64_t summed,
                   int64_t kernel) {
  const Shape shape = check_activation<Device>(op, name, x);
  check_same_dtype(op, "weight", weight, x);
  check_channels_last(op, "weight", weight);
  check_device(op, "weight", weight, Device::kCuda);
  const std::string channels = std::to_string(shape.channels);
  if (weight.size(summed) != shape.channels || weight.size(2) != kernel || weight.size(3) != kernel) {
    const std::string side = std::to_string(kernel), window = ", " + side + ", " + side + "]";
    fail(op, "weight", sizes_of(weight), (summed == 0 ? "[" + channels + ", Cin" : "[Cout, " + channels) + window,
         "pass the weight of this convolution");
  }
  Device::check_convolutions(op, name, x);
  if (!Device::kCuda && shape.dtype != Dtype::kFloat32 && shape.channels % 2 != 0) {
    fail(op, name, channels + " channels", "an even number", "use backend='reference'");
  }
  return shape;
}

template <class Device>
Shape check_1x1(const char* op, const char* name, const Tensor& x, const Tensor& weight, int64_t summed) {
  return check_weight<Device>(op, name, x, weight, summed, 1);
}

// The result y of these sizes [N, C, H, W], in x's dtype: `out`, if it is one that shares no memory with `others`, or a
// new tensor where there is no `out`.
inline Tensor given_or_new(const char* op, const OptionalTensor& out, const Tensor& x,
                           const std::array<int64_t, 4>& sizes, std::initializer_list<Named> others) {
  if (!out) return new_channels_last(x, sizes[0], sizes[1], sizes[2], sizes[3], dtype_code(x));
  check_channels_last(op, "y", *out);
  check_same_dtype(op, "y", *out, x);
  check_device(op, "y", *out, x.is_cuda());
  for (int64_t i = 0; i < 4; ++i) {
    if (out->size(i) == sizes[i]) continue;
    fail(op, "y", sizes_of(*out), std::to_string(sizes[i]) + " along dimension " + std::to_string(i),
         "pass a tensor of the output's shape");
  }
  for (const Named& other : others) {
    if (other.tensor == nullptr || !share_memory(*out, *other.tensor)) continue;
    fail(op, "y", std::string("in the memory of ") + other.name, "memory of its own", "pass a new tensor");
  }
  return *out;
}

// Two vectors [channels], which are given together.
struct VectorPair {
  const char *both, *scale_name, *shift_name;
  const OptionalTensor scale, shift;

  void check(const char* op, int64_t channels) const {
    check_together(op, both, scale.has_value(), shift.has_value());
    check_vector(op, scale_name, scale, channels);
    check_vector(op, shift_name, shift, channels);
  }
};

}  // namespace fusedres::front
