// A value near the mean of an activation, from a few of its rows, for products of deviations.
#pragma once

#include "product.h"

namespace fusedres::cuda {

constexpr int kSampleThreads = 128;
constexpr int kSampleRows = 256;

struct Sample {
  float mean;
  // Whether the mean lies more than 4 standard deviations from 0. 16-bit values and their mean then mostly lie within a
  // factor of 2, where their difference is exact in their dtype; below that, products lose little to cancellation.
  bool far;
};

// Of `a = relu(scale*c + shift)`, channel i of c [P, channels], over rows spread along c.
template <class T>
__device__ __forceinline__ Sample sample(const T* c, const float* scale, const float* shift, int64_t rows, int channels,
                                         int i) {
  const int count = rows < kSampleRows ? int(rows) : kSampleRows;
  const int64_t step = count > 0 ? rows / count : 0;
  float base = 0.f, sum = 0.f, square = 0.f;
  for (int k = 0; k < count; ++k) {
    const float a = to_float(activate(c[k * step * channels + i], scale[i], shift[i]));
    if (k == 0) base = a;
    sum += a - base;
    square = fmaf(a - base, a - base, square);
  }
  if (count == 0) return {0.f, false};
  const float mean_from_base = sum / float(count), mean = base + mean_from_base;
  return {mean, mean * mean * float(count) > 16.f * (square - sum * mean_from_base)};
}

}  // namespace fusedres::cuda
