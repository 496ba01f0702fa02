// Launch geometry of the products: which block computes which tiles. Plain arithmetic, no CUDA.
//
// An output [rows, columns] is cut into tiles of 128 x 128. A block owns the columns of one tile and every groups-th
// tile of rows, so that it leaves one partial result for each column, however many rows there are.
#pragma once

#include "plan.h"

namespace fusedres::cuda {

constexpr int kProductThreads = 256;
constexpr int kProductSide = 128;  // rows and columns of a tile
constexpr int kProductDepth = 32;  // of the inner dimension, a step
constexpr int kProductBlocks = 2;  // a multiprocessor, of 48 KiB and at most 128 registers a thread
constexpr int kProductValues = 2;  // partial results of a column: mean and M2

struct ProductPlan {
  int64_t rows;
  int columns;
  int depth;
  int64_t column_tiles;  // blockIdx.x: neighbours read the same rows, which come from L2 for all but the first
  int64_t row_tiles;
  int groups;  // blockIdx.y

  FUSEDRES_HOST_DEVICE constexpr int steps() const { return int(ceil_div(depth, kProductDepth)); }
  FUSEDRES_HOST_DEVICE constexpr int first_column(int column_tile) const { return column_tile * kProductSide; }
  FUSEDRES_HOST_DEVICE constexpr int64_t first_row(int64_t row_tile) const { return row_tile * kProductSide; }
  FUSEDRES_HOST_DEVICE constexpr int rows_of_tile(int64_t row_tile) const {
    const int64_t left = rows - first_row(row_tile);
    return left < kProductSide ? int(left) : kProductSide;
  }
  FUSEDRES_HOST_DEVICE constexpr int64_t rows_of_group(int64_t group) const {
    if (group >= row_tiles) return 0;
    const int64_t after = (row_tiles - 1 - group) / groups;  // tiles of the group but the first
    const int64_t last = group + after * groups;
    return after * kProductSide + rows_of_tile(last);
  }
  // doubles before the partial results of one block
  FUSEDRES_HOST_DEVICE constexpr int64_t partial_of(int64_t column_tile, int64_t group) const {
    return (column_tile * groups + group) * kProductValues * kProductSide;
  }
  FUSEDRES_HOST_DEVICE constexpr int64_t counter_bytes() const { return ceil_div(column_tiles * 4, 256) * 256; }
  size_t workspace_bytes() const { return size_t(counter_bytes() + partial_of(column_tiles, 0) * 8); }
};

// columns and depth at most kMaxChannels
inline ProductPlan plan_product(int64_t rows, int64_t columns, int64_t depth, const DeviceLimits& limits) {
  ProductPlan plan{};
  plan.rows = rows;
  plan.columns = int(columns);
  plan.depth = int(depth);
  plan.column_tiles = ceil_div(columns, kProductSide);
  plan.row_tiles = ceil_div(rows, kProductSide);
  const int64_t wanted = int64_t(limits.multiprocessors) * kProductBlocks / std::max<int64_t>(plan.column_tiles, 1);
  plan.groups = int(std::clamp<int64_t>(std::min(wanted, plan.row_tiles), 1, kMaxGridY));
  return plan;
}

}  // namespace fusedres::cuda
