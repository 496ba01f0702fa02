#pragma once

#include <cstdint>

namespace fusedres::cpu {

struct ScaleShift {
  const float *mean, *var;     // [channels]
  const float *weight, *bias;  // [channels], null for 1 and 0
  float *invstd, *scale, *shift;
};

void bn_scale_shift(const ScaleShift& v, double eps, int64_t channels);

struct BackwardCoefficients {
  const float *sum_dz, *sum_dz_centered, *mean, *invstd, *scale;  // [channels]
  float *dweight, *b, *k;                                         // b and k null: frozen statistics
};

void bn_backward_coefficients(const BackwardCoefficients& v, int64_t rows, int64_t channels);

}  // namespace fusedres::cpu
