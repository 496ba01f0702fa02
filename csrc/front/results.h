// Results that the caller may give: an op then writes them into memory that is used again.
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

// The result of these sizes [N, C, H, W], channels_last, in x's dtype: `out`, if it is one that shares no memory with
// `others`, or a new tensor where `out` is absent.
inline Tensor given_or_new(const char* op, const Named& out, const Tensor& x, const std::array<int64_t, 4>& sizes,
                           std::initializer_list<Named> others) {
  if (out.tensor == nullptr) return new_channels_last(x, sizes[0], sizes[1], sizes[2], sizes[3], dtype_code(x));
  const Tensor& given = *out.tensor;
  check_channels_last(op, out.name, given);
  check_same_dtype(op, out.name, given, x);
  check_device(op, out.name, given, x.is_cuda());
  for (int64_t i = 0; i < 4; ++i) {
    if (given.size(i) == sizes[i]) continue;
    fail(op, out.name, sizes_of(given), std::to_string(sizes[i]) + " along dimension " + std::to_string(i),
         "pass a tensor of the result's shape");
  }
  for (const Named& other : others) {
    if (other.tensor == nullptr || !share_memory(given, *other.tensor)) continue;
    fail(op, out.name, std::string("in the memory of ") + other.name, "memory of its own", "pass a new tensor");
  }
  return given;
}

}  // namespace fusedres::front
