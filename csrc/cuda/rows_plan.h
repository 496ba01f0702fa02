// Launch geometry of products that sum over the rows of activations, [left, rows] times [rows, right]: which block
// computes which tile over which rows. Plain arithmetic, no CUDA.
//
// An output is cut into tiles of 128 x 128, and the rows into splits. A block leaves the partial result of one tile and
// split, in float32; the partial results are merged in the order of the splits, in float64.
#pragma once

#include "product_plan.h"

namespace fusedres::cuda {

constexpr int kMostRowsOfSplit = 4096;  // sums of float32 no longer than this
constexpr int kFewestRowsOfSplit = 256;
constexpr int64_t kMostElementsOfSplit = (int64_t(1) << 32) - 1;  // of an operand: a place fits 32 bits
static_assert(kMaxChannels * kProductDepth <= kMostElementsOfSplit);

struct RowsPlan {
  int64_t rows;
  int left, right;  // channels
  int left_tiles, right_tiles;
  bool upper;     // left and right are the same: tiles below the diagonal are left out
  int64_t tiles;  // blockIdx.x: neighbours read the same rows
  int64_t rows_of_split;
  int splits;  // blockIdx.y

  FUSEDRES_HOST_DEVICE constexpr int64_t first_row(int64_t split) const { return split * rows_of_split; }
  FUSEDRES_HOST_DEVICE constexpr int64_t rows_from(int64_t first) const {
    return rows - first < rows_of_split ? rows - first : rows_of_split;
  }
  // the tile's place on the left; that on the right is what is left of `tile`
  FUSEDRES_HOST_DEVICE constexpr int left_tile(int64_t tile, int* right_tile) const {
    int row = 0;
    for (int64_t width = right_tiles; tile >= width; width -= upper) tile -= width, ++row;
    *right_tile = int(tile) + (upper ? row : 0);
    return row;
  }
  // floats: sums of the left channels [splits][left], then products [splits][left][right]
  FUSEDRES_HOST_DEVICE constexpr int64_t sums_of(int64_t split) const { return split * left; }
  FUSEDRES_HOST_DEVICE constexpr int64_t products_of(int64_t split) const {
    return (sums_of(splits) + 3) / 4 * 4 + split * left * right;
  }
  constexpr int64_t floats() const { return products_of(splits); }
};

inline RowsPlan plan_rows(int64_t rows, int64_t left, int64_t right, bool upper, const DeviceLimits& limits) {
  RowsPlan plan{};
  plan.rows = rows;
  plan.left = int(left);
  plan.right = int(right);
  plan.upper = upper;
  plan.left_tiles = int(ceil_div(left, kProductSide));
  plan.right_tiles = int(ceil_div(right, kProductSide));
  plan.tiles =
      upper ? int64_t(plan.left_tiles) * (plan.left_tiles + 1) / 2 : int64_t(plan.left_tiles) * plan.right_tiles;
  const int64_t wanted = std::max<int64_t>(1, int64_t(limits.multiprocessors) * kProductBlocks / plan.tiles);
  const int64_t even = std::clamp<int64_t>(ceil_div(rows, wanted), kFewestRowsOfSplit, kMostRowsOfSplit);
  const int64_t needed = std::max(even, ceil_div(rows, kMaxGridY));
  const int64_t most = kMostElementsOfSplit / std::max<int64_t>({left, right, 1}) / kProductDepth;
  plan.rows_of_split = std::min(ceil_div(needed, kProductDepth), most) * kProductDepth;
  plan.splits = int(std::max<int64_t>(1, ceil_div(rows, plan.rows_of_split)));
  return plan;
}

}  // namespace fusedres::cuda
