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
    const double invstd = 1 / std::sqrt(double(args.var[j]) + args.eps);
    args.invstd[j] = float(invstd);
    args.scale[j] = float(element(args.weight, j, 1) * invstd);
    // from the rounded scale, so that scale*mean + shift is the bias again
    args.shift[j] = float(element(args.bias, j, 0) - double(args.mean[j]) * args.scale[j]);
  }
}

void bn_backward_coefficients(const BnBackwardCoefficients& args) {
  const double rows = double(args.rows);
  for (int64_t j = 0; j < args.channels; ++j) {
    const double scale = args.scale[j], invstd = args.invstd[j], centered = args.sum_dz_centered[j];
    args.dweight[j] = float(invstd * centered);
    if (args.B == nullptr) continue;
    args.B[j] = float(-scale * invstd * invstd * centered / rows);
    args.K[j] = float(-scale * args.sum_dz[j] / rows - double(args.B[j]) * args.mean[j]);
  }
}

}  // namespace fusedres::cpu
