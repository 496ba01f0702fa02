// The tiles of a product: kPanel rows and kPanelIn columns of results in registers. Included after vec_avx2.h or
// vec_avx512.h.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace {

using namespace fusedres::cpu;

constexpr int kPanel = kWidth == 8 ? 6 : 14;  // with 2 vectors each they fill the registers
constexpr int64_t kPanelIn = kVectorsOfPanel * kWidth;
constexpr int64_t kCopied = kWidth == 8 ? 8 : 16;  // floats copied at once for a panel, at least kPanel
constexpr int64_t kLine = 16;                      // floats of a line of the cache

// [first, first + size) of `channels`, or of other rows of results: `panels` of them, as equal as they can be.
struct Panel {
  Panel(int64_t channels, int64_t panels, int64_t index)
      : first(channels * index / panels), size(channels * (index + 1) / panels - first), slack(index * kCopied) {}
  // where its copy begins
  float* in(float* packed, int64_t positions) const { return packed + first * positions + slack; }
  int64_t first, size, slack;
};

inline int64_t count_panels(int64_t channels) { return (channels + kPanel - 1) / kPanel; }

}  // namespace
