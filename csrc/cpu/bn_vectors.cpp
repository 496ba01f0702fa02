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

// Rounded as torch rounds mul_ and add_ with alpha.
void bn_running_stats(const BnRunningStats& args) {
  for (const BnRunningStats::Norm* norm = args.norms; norm != args.norms + args.count; ++norm) {
    for (int64_t j = 0; j < norm->channels; ++j) {
      norm->running_mean[j] = std::fma(norm->weight, norm->mean[j], norm->keep * norm->running_mean[j]);
      norm->running_var[j] = std::fma(norm->unbiased, norm->var[j], norm->keep * norm->running_var[j]);
    }
    if (norm->counter != nullptr) ++*norm->counter;
  }
}

}  // namespace fusedres::cpu
