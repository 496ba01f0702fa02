// A tile of a product of matrices in float64, [64, depth] times [depth, 64], for the algebra on weights and moments.
// Operands are given by functions, so that they are converted, and made, as they are loaded into shared memory.
#pragma once

#include "launch.h"

namespace fusedres::cuda {

constexpr int kFloat64Threads = 256;
constexpr int kFloat64Blocks = 2;  // a multiprocessor, of at most 128 registers a thread
constexpr int kFloat64Side = 64;   // rows and columns of a tile
constexpr int kFloat64Depth = 16;  // of the inner dimension, a step
constexpr int kFloat64Lanes = 16;  // threads side by side, each of which has every 16th row and column
constexpr int kFloat64Each = kFloat64Side / kFloat64Lanes;                     // 4
constexpr int kFloat64Stride = kFloat64Side + 1;                               // banks differ along the depth too
constexpr int kFloat64Loads = kFloat64Side * kFloat64Depth / kFloat64Threads;  // 4, of each operand a step
constexpr int kFloat64Doubles = 2 * kFloat64Side * (kFloat64Lanes + 1);        // of shared memory
static_assert(2 * kFloat64Depth * kFloat64Stride <= kFloat64Doubles);

// The 4 x 4 elements that a thread has of a tile.
struct Float64Tile {
  double value[kFloat64Each][kFloat64Each] = {};

  __device__ static __forceinline__ int row(int i) { return int(threadIdx.x) / kFloat64Lanes + i * kFloat64Lanes; }
  __device__ static __forceinline__ int column(int j) { return int(threadIdx.x) % kFloat64Lanes + j * kFloat64Lanes; }
};

// The tile's product over [first, last) of the inner dimension: left(row, k) and right(k, column), by places in the
// tile, are 0 beyond the ends of their matrices.
// kLeftByRows: whether the left operand's neighbours in memory are along k; else along its rows, as the right one's are
// along its columns. shared: kFloat64Doubles, free when this returns
template <bool kLeftByRows, class Left, class Right>
__device__ __forceinline__ void multiply_float64(Float64Tile& tile, double* shared, int first, int last, Left left,
                                                 Right right) {
  const int thread = int(threadIdx.x);
  double* lefts = shared;  // [16][65] each
  double* rights = shared + kFloat64Depth * kFloat64Stride;
  const auto outside = [&](int i) { return (thread + i * kFloat64Threads) % kFloat64Side; };
  const auto depth = [&](int i) { return (thread + i * kFloat64Threads) / kFloat64Side; };
  const auto left_row = [&](int i) {
    return kLeftByRows ? (thread + i * kFloat64Threads) / kFloat64Depth : outside(i);
  };
  const auto left_depth = [&](int i) { return kLeftByRows ? thread % kFloat64Depth : depth(i); };
  double next_left[kFloat64Loads], next_right[kFloat64Loads];
  const auto load = [&](int k) {
#pragma unroll
    for (int i = 0; i < kFloat64Loads; ++i) {
      next_left[i] = k + left_depth(i) < last ? left(left_row(i), k + left_depth(i)) : 0.;
      next_right[i] = k + depth(i) < last ? right(k + depth(i), outside(i)) : 0.;
    }
  };
  load(first);
#pragma unroll 1
  for (int k = first; k < last; k += kFloat64Depth) {
#pragma unroll
    for (int i = 0; i < kFloat64Loads; ++i) {
      lefts[left_depth(i) * kFloat64Stride + left_row(i)] = next_left[i];
      rights[depth(i) * kFloat64Stride + outside(i)] = next_right[i];
    }
    __syncthreads();
    load(k + kFloat64Depth);
#pragma unroll 4
    for (int step = 0; step < kFloat64Depth; ++step) {
      double a[kFloat64Each], b[kFloat64Each];
#pragma unroll
      for (int i = 0; i < kFloat64Each; ++i) {
        a[i] = lefts[step * kFloat64Stride + Float64Tile::row(i)];
        b[i] = rights[step * kFloat64Stride + Float64Tile::column(i)];
      }
#pragma unroll
      for (int i = 0; i < kFloat64Each; ++i)
#pragma unroll
        for (int j = 0; j < kFloat64Each; ++j) tile.value[i][j] = fma(a[i], b[j], tile.value[i][j]);
    }
    __syncthreads();
  }
}

// How many tiles are side by side.
FUSEDRES_HOST_DEVICE constexpr int float64_tiles(int64_t size) { return int(ceil_div(size, kFloat64Side)); }

// Element (row, column) of a weight [rows, columns], 0 beyond its ends.
template <class T>
struct Float64Weight {
  const T* data;
  int rows, columns;

  __device__ __forceinline__ double operator()(int row, int column) const {
    return row < rows && column < columns ? double(to_float(data[int64_t(row) * columns + column])) : 0.;
  }
};

// A tile of W S, with S [weight.columns, weight.columns].
template <class T>
__device__ __forceinline__ void multiply_by_moments(Float64Tile& tile, double* shared, const Float64Weight<T>& weight,
                                                    const float* S, int first_row, int first_column) {
  const Float64Weight<float> moments{S, weight.columns, weight.columns};
  multiply_float64<true>(
      tile, shared, 0, weight.columns, [&](int row, int k) { return weight(first_row + row, k); },
      [&](int k, int column) { return moments(k, first_column + column); });
}

}  // namespace fusedres::cuda
