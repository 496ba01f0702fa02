// The tiles of a product: kPanel rows and kPanelIn columns of results in registers. Included after vec_avx2.h or
// vec_avx512.h.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace {

using namespace fusedres::cpu;

constexpr int kPanel = rows_of_tile(kWidth);
constexpr int64_t kPanelIn = kVectorsOfPanel * kWidth;
template <class T>
constexpr int64_t kLine = 64 / sizeof(T);  // values in a cache line

}  // namespace
