// The ops on channel vectors alone: C values, computed in double, rounded once.
#include "channel_ops.h"

#include <cmath>

namespace fusedres::cpu {

void bn_scale_shift(const ScaleShift& v, double eps, int64_t channels) {
  for (int64_t j = 0; j < channels; ++j) {
    const double invstd = 1 / std::sqrt(static_cast<double>(v.var[j]) + eps);
    const double weight = v.weight == nullptr ? 1 : v.weight[j], bias = v.bias == nullptr ? 0 : v.bias[j];
    v.invstd[j] = static_cast<float>(invstd);
    v.scale[j] = static_cast<float>(weight * invstd);
    // from the rounded scale, so that scale*mean + shift is the bias again
    v.shift[j] = static_cast<float>(bias - static_cast<double>(v.mean[j]) * v.scale[j]);
  }
}

void bn_backward_coefficients(const BackwardCoefficients& v, int64_t rows, int64_t channels) {
  for (int64_t j = 0; j < channels; ++j) {
    const double scale = v.scale[j], invstd = v.invstd[j], centered = v.sum_dz_centered[j];
    v.dweight[j] = static_cast<float>(invstd * centered);
    if (v.b == nullptr) continue;
    v.b[j] = static_cast<float>(-scale * invstd * invstd * centered / static_cast<double>(rows));
    v.k[j] = static_cast<float>(-scale * v.sum_dz[j] / static_cast<double>(rows) -
                                static_cast<double>(v.b[j]) * v.mean[j]);
  }
}

}  // namespace fusedres::cpu
