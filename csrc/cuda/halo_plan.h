// Geometry of the halo of a tile: the positions of x that a 3x3 window reaches from 128 neighbouring positions of y,
// without stride. Plain arithmetic, no CUDA.
//
// Positions are rows of NHWC memory, and so are those of the halo: it is one piece of memory, from a line and a
// position before the tile to a line and a position behind it. What a tap outside the image finds there is another
// line's or another image's, and is not read: such a tap reads a place of zeros.
#pragma once

#include "product_plan.h"

namespace fusedres::cuda {

constexpr int kTapsOfLine = 3, kTaps = kTapsOfLine * kTapsOfLine;
constexpr int kHaloPlaces = 384;  // in shared memory, of 32 channels: 24 KiB, as much as the ring of weights
constexpr int kZeroPlace = kHaloPlaces - 1;

struct HaloPlan {
  int height, width;
  int64_t rows;  // N*height*width
  int halves;    // 2: both halves of the memory have room for a halo, and one is loaded as the other is multiplied

  FUSEDRES_HOST_DEVICE constexpr int places() const { return kProductSide + 2 * width + 2; }
  // of a step of 32 channels, the first of its places
  FUSEDRES_HOST_DEVICE constexpr int first_place(int step) const { return step % halves * (kHaloPlaces / 2); }
  // from the first of its places, the one that row `row` of the tile reads for a tap
  FUSEDRES_HOST_DEVICE constexpr int place_of(int row, int line, int column) const {
    return row + line * width + column;
  }
  // the row of x in the first of its places, of the tile from row `first` on
  FUSEDRES_HOST_DEVICE constexpr int64_t first_row(int64_t first) const { return first - width - 1; }
  // of its places, those from begin to end are of rows that x has
  FUSEDRES_HOST_DEVICE constexpr int begin(int64_t first) const {
    return first_row(first) < 0 ? int(-first_row(first)) : 0;
  }
  FUSEDRES_HOST_DEVICE constexpr int end(int64_t first) const {
    const int64_t left = rows - first_row(first);
    return left < places() ? int(left) : places();
  }
  // A bit for each tap that is inside the image, of the position `row` rows behind one in line `h` and column `w`.
  FUSEDRES_HOST_DEVICE constexpr unsigned taps_inside(int h, int w, int row) const {
    const int column = (w + row) % width, line = (h + (w + row) / width) % height;
    unsigned taps = (1u << kTaps) - 1u;
    if (line == 0) taps &= ~0007u;
    if (line == height - 1) taps &= ~0700u;
    if (column == 0) taps &= ~0111u;
    if (column == width - 1) taps &= ~0444u;
    return taps;
  }
};

// Whether the halo of lines this wide has room. Wider ones would leave a multiprocessor of 100 KiB with one block.
constexpr bool halo_fits(int64_t width) { return kProductSide + 2 * width + 2 <= kZeroPlace; }

inline HaloPlan plan_halo(int64_t height, int64_t width, int64_t rows) {
  HaloPlan plan{int(height), int(width), rows, 1};
  if (kHaloPlaces / 2 + plan.places() <= kZeroPlace) plan.halves = 2;
  return plan;
}

}  // namespace fusedres::cuda
