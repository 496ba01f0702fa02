// Weights of float32 as sums of two terms of the activation dtype, and where these lie: as the right operand of one
// product with a concatenated inner dimension, [dz | a] times [weight_dz ; weight_a].
//
// dz, a and the ReLU's mask below go together, so that errors of rounded weights would not average out.
#pragma once

#include "launch.h"
#include "product_plan.h"

namespace fusedres::cuda {

constexpr int kTermColumns = kProductSide / 2;  // 64: a tile of the product has those of both terms side by side
constexpr int kSplitThreads = 256;

// terms [steps * 32][column_tiles][2][64]
struct TermsPlan {
  int64_t column_tiles;  // of the output
  int dz_steps;          // of the inner dimension, over dz; those over a follow
  int steps;

  FUSEDRES_HOST_DEVICE constexpr int64_t stride() const { return column_tiles * kProductSide; }
  constexpr int64_t elements() const { return steps * kProductDepth * stride(); }
};

inline TermsPlan plan_terms(const Conv1x1GramBackwardInput& args) {
  TermsPlan plan{};
  plan.column_tiles = ceil_div(args.in_channels, kTermColumns);
  plan.dz_steps = int(ceil_div(args.out_channels, kProductDepth));
  plan.steps = plan.dz_steps;
  if (args.weight_a != nullptr) plan.steps += int(ceil_div(args.in_channels, kProductDepth));
  return plan;
}

// The second term is scaled: float16 has few exponents, and would lose what a small weight leaves.
template <class T>
constexpr float kRestScale = std::is_same_v<T, __half> ? 2048.f : 1.f;

template <class T>
struct Terms {
  T high, rest;

  // Infinities have no rest: it would be NaN.
  __device__ __forceinline__ explicit Terms(float weight) : high(round_to<T>(weight)) {
    const float left = weight - to_float(high);
    rest = round_to<T>(isfinite(left) ? left * kRestScale<T> : 0.f);
  }
  __device__ __forceinline__ double sum() const {
    return double(to_float(high)) + double(to_float(rest)) / double(kRestScale<T>);
  }
};

// moved_offset [in_channels] of a tile's columns: offset - center (the sum of the terms), for an a without center. a is
// exact as it is, a - center would be rounded.
template <class T>
__device__ __forceinline__ void move_offset(const Conv1x1GramBackwardInput& args, int first_column,
                                            float* moved_offset) {
  FUSEDRES_SHARED(double, parts, kSplitThreads);
  const int thread = int(threadIdx.x), column = first_column + thread % kTermColumns, channels = int(args.in_channels);
  double added = 0.;
  if (column < channels)
    for (int k = thread / kTermColumns; k < channels; k += kSplitThreads / kTermColumns)
      added += double(args.center[k]) * Terms<T>(args.weight_a[int64_t(k) * channels + column]).sum();
  parts[thread] = added;
  __syncthreads();
  if (thread >= kTermColumns || column >= channels) return;
  for (int part = thread + kTermColumns; part < kSplitThreads; part += kTermColumns) added += parts[part];
  moved_offset[column] = float(double(args.offset[column]) - added);
}

// The terms of both weights, 0 beyond their ends. A block makes one tile's columns of one step, the last ones the
// offset.
template <class T>
__global__ void __launch_bounds__(kSplitThreads)
    split_weights_kernel(Conv1x1GramBackwardInput args, TermsPlan plan, T* terms, float* moved_offset) {
  const int64_t step = blockIdx.x / plan.column_tiles;
  const int tile = int(blockIdx.x - step * plan.column_tiles), first_column = tile * kTermColumns;
  if (step == plan.steps) return move_offset<T>(args, first_column, moved_offset);
  const bool of_dz = step < plan.dz_steps;
  const float* weight = of_dz ? args.weight_dz : args.weight_a;
  const int64_t first_row = (of_dz ? step : step - plan.dz_steps) * kProductDepth;
  const int64_t rows = of_dz ? args.out_channels : args.in_channels;
  const int column = int(threadIdx.x) % kTermColumns;
  const bool has_column = first_column + column < args.in_channels;
  for (int i = int(threadIdx.x) / kTermColumns; i < kProductDepth; i += kSplitThreads / kTermColumns) {
    const bool exists = has_column && first_row + i < rows;
    const Terms<T> of_weight(exists ? weight[(first_row + i) * args.in_channels + first_column + column] : 0.f);
    T* to = terms + (step * kProductDepth + i) * plan.stride() + int64_t(tile) * kProductSide + column;
    to[0] = of_weight.high;
    to[kTermColumns] = of_weight.rest;
  }
}

}  // namespace fusedres::cuda
