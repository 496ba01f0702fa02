// The tiles of a product: kPanel rows and kPanelIn columns of results in registers. Included after vec_avx2.h or
// vec_avx512.h.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace {

using namespace fusedres::cpu;

constexpr int kPanel = kWidth == 8 ? 6 : 14;  // with 2 vectors each they fill the registers
constexpr int64_t kPanelIn = kVectorsOfPanel * kWidth;
constexpr int64_t kLine = 16;  // floats of a line of the cache

}  // namespace
