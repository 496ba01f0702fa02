// The ops on channel vectors alone: C values, computed in double, rounded once.
#include <cmath>

#include "launch.h"

namespace fusedres::cpu {

namespace {

double element(const Parameter& parameter, int64_t channel, double absent) {
  return parameter.data == nullptr ? absent : static_cast<const float*>(parameter.data)[channel];
}

}  // namespace

void bn_scale_shift(const BnScaleShift& args) {
  for (int64_t j = 0; j < args.channels; ++j) {
    const double invstd = 1 / std::sqrt(static_cast<double>(args.var[j]) + args.eps);
    args.invstd[j] = static_cast<float>(invstd);
    args.scale[j] = static_cast<float>(element(args.weight, j, 1) * invstd);
    // from the rounded scale, so that scale*mean + shift is the bias again
    args.shift[j] = static_cast<float>(element(args.bias, j, 0) - static_cast<double>(args.mean[j]) * args.scale[j]);
  }
}

void bn_backward_coefficients(const BnBackwardCoefficients& args) {
  const double rows = static_cast<double>(args.rows);
  for (int64_t j = 0; j < args.channels; ++j) {
    const double scale = args.scale[j], invstd = args.invstd[j], centered = args.sum_dz_centered[j];
    args.dweight[j] = static_cast<float>(invstd * centered);
    if (args.B == nullptr) continue;
    args.B[j] = static_cast<float>(-scale * invstd * invstd * centered / rows);
    args.K[j] = static_cast<float>(-scale * args.sum_dz[j] / rows - static_cast<double>(args.B[j]) * args.mean[j]);
  }
}

}  // namespace fusedres::cpu
