// Winograd's 3x3 convolutions: the products of transformed tiles and weights, and the table of each algorithm's
// kernels. Included after vec_avx2.h or vec_avx512.h.
#pragma once

#include "winograd_inputs.h"
#include "winograd_outputs.h"

namespace {

using namespace fusedres::cpu;

// sums[r, :] (+)= sum over k of a[r, k] * b[k, :], for one panel of columns.
// next: the panel that comes after b, whose lines are fetched; b itself where they are there already.
template <int size>
void multiply_panel(const PlaneProducts& p, const float* a, const float* b, const float* next, float* result,
                    bool add) {
  Float sums[size][2];
#pragma GCC unroll 14
  for (int r = 0; r < size; ++r) {
    sums[r][0] = sums[r][1] = zero();
    _mm_prefetch(result + r * p.result_row, _MM_HINT_T0);
  }
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_depth, b += p.b_depth, next += p.b_depth) {
    _mm_prefetch(next, _MM_HINT_T0);
    if constexpr (kPanelIn > 16) _mm_prefetch(next + 16, _MM_HINT_T0);
    const Float low = load(b), high = load(b + kWidth);
#pragma GCC unroll 14
    for (int r = 0; r < size; ++r) {
      const Float one = repeat(a + r * p.a_row);
      sums[r][0] = fma(one, low, sums[r][0]);
      sums[r][1] = fma(one, high, sums[r][1]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < size; ++r, result += p.result_row) {
    if (add) {
      sums[r][0] = sums[r][0] + load(result);
      sums[r][1] = sums[r][1] + load(result + kWidth);
    }
    store(result, sums[r][0]);
    store(result + kWidth, sums[r][1]);
  }
}

template <int most>
FUSEDRES_INLINE void multiply_panel_of(int64_t size, const PlaneProducts& p, const float* a, const float* b,
                                       const float* next, float* result, bool add) {
  if constexpr (most > 1) {
    if (size < most) return multiply_panel_of<most - 1>(size, p, a, b, next, result, add);
  }
  multiply_panel<most>(p, a, b, next, result, add);
}

// The products of all planes. The rows are shared as equally as they can be by tiles of registers.
void multiply_planes(const PlaneProducts& p) {
  const int64_t tiles = (p.rows + kPanel - 1) / kPanel;
  for (int64_t plane = 0; plane < p.planes; ++plane) {
    const float *a = p.a + plane * p.a_plane, *b = p.b + plane * p.b_plane;
    float* result = p.result + plane * p.result_plane;
    for (int64_t panel = 0; panel < p.panels; ++panel) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = p.rows * tile / tiles, size = p.rows * (tile + 1) / tiles - row;
        const float *mine = b + panel * p.b_panel, *next = panel + 1 < p.panels ? mine + p.b_panel : b + p.b_plane;
        multiply_panel_of<kPanel>(size, p, a + row * p.a_row, mine, tile == 0 ? next : mine,
                                  result + row * p.result_row + panel * kPanelIn, p.add);
      }
    }
  }
}

template <class Tile>
constexpr WinogradKernels winograd_of() {
  return {Tile::kOutputs,           Tile::kInputs * Tile::kInputs,
          ::transform_input<Tile>,  ::transform_output_gradient<Tile>,
          ::transform_weight<Tile>, ::transform_weight_reversed<Tile>,
          ::transform_output<Tile>, ::transform_weight_gradient<Tile>};
}

}  // namespace
