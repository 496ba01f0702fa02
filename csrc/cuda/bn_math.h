// The formulas of batch normalisation, one place for all kernels. Maths: fusedres/ops/contract/.
#pragma once

#include "launchers.h"
#include "packet.h"

namespace fusedres::cuda {

// The fmaf is explicit: forward and backward must round alike, or a mask that is made again would differ.
__device__ __forceinline__ float affine(float c, float scale, float shift) { return fmaf(c, scale, shift); }

// The mask bit of a rounded value. It is not `> 0`, because NaN passes, as in torch.
__device__ __forceinline__ bool passes(float rounded) { return !(rounded <= 0.f); }

// Where dz comes from: from bits that the forward packed (without bits, dz = dy), or from the sign of the rounded
// scale*c + shift. Every backward kernel reads c anyway.
enum class Gate { kBits, kSign };

// dc = A*dz + B*c + K. The product is rounded by itself: with one row it is exactly -K, and dc is 0.
__device__ __forceinline__ float apply_coefficients(float dz, float c, float A, float B, float K, bool training) {
  return training ? __fadd_rn(__fmul_rn(A, dz), affine(c, B, K)) : A * dz;
}

__device__ inline double parameter(const Parameter& p, int64_t channel, double absent) {
  if (p.data == nullptr) return absent;
  switch (p.dtype) {
    case Dtype::kFloat16: return __half2float(static_cast<const __half*>(p.data)[channel]);
    case Dtype::kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(p.data)[channel]);
    case Dtype::kFloat32: return static_cast<const float*>(p.data)[channel];
    default: return static_cast<const double*>(p.data)[channel];
  }
}

// The vectors are computed in float64 and rounded once. shift comes from the rounded scale, so that the errors of scale
// and shift cancel.
__device__ inline void scale_shift_of_channel(const BnScaleShift& args, int64_t channel, float mean, float var) {
  const double invstd = 1.0 / sqrt(double(var) + args.eps);
  const float scale = float(parameter(args.weight, channel, 1.0) * invstd);
  args.invstd[channel] = float(invstd);
  args.scale[channel] = scale;
  args.shift[channel] = float(parameter(args.bias, channel, 0.0) - double(mean) * double(scale));
}

// dweight, and in training B = -scale*invstd*dweight/P, K = -A*dbias/P - B*mean
__device__ inline void coefficients_of_channel(const BnBackwardCoefficients& args, int64_t channel, float sum_dz,
                                               float sum_dz_centered) {
  const double A = args.scale[channel], invstd = args.invstd[channel];
  args.dweight[channel] = args.invstd[channel] * sum_dz_centered;
  if (args.B == nullptr) return;
  const float B = float(-A * invstd * invstd * sum_dz_centered / double(args.rows));
  args.B[channel] = B;
  args.K[channel] = float(-A * sum_dz / double(args.rows) - double(B) * args.mean[channel]);
}

}  // namespace fusedres::cuda
