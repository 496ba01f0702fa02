// Winograd's 3x3 convolutions: the products of transformed tiles and weights, and the table of each algorithm's
// kernels. Included after vec_avx2.h or vec_avx512.h.
#pragma once

#include "winograd_inputs.h"
#include "winograd_outputs.h"

namespace {

using namespace fusedres::cpu;

// sums[r, :] (+)= sum over k of a[r, k] * b[k, :], for one panel of columns, or the first vector of one.
// next: the panel that comes after b, whose lines are fetched; b itself where they are there already.
template <int size, int columns>
void multiply_panel(const PlaneProducts& p, const float* a, const float* b, const float* next, float* result,
                    bool add) {
  Float sums[size][columns];
#pragma GCC unroll 14
  for (int r = 0; r < size; ++r) {
    FUSEDRES_UNROLLED
    for (int v = 0; v < columns; ++v) sums[r][v] = zero();
    _mm_prefetch(result + r * p.result_row, _MM_HINT_T0);
  }
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_depth, b += p.b_depth, next += p.b_depth) {
    _mm_prefetch(next, _MM_HINT_T0);
    if constexpr (columns * kWidth > 16) _mm_prefetch(next + 16, _MM_HINT_T0);
    Float values[columns];
    FUSEDRES_UNROLLED
    for (int v = 0; v < columns; ++v) values[v] = load(b + v * kWidth);
#pragma GCC unroll 14
    for (int r = 0; r < size; ++r) {
      const Float one = repeat(a + r * p.a_row);
      FUSEDRES_UNROLLED
      for (int v = 0; v < columns; ++v) sums[r][v] = fma(one, values[v], sums[r][v]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < size; ++r, result += p.result_row) {
    FUSEDRES_UNROLLED
    for (int v = 0; v < columns; ++v) {
      if (add) sums[r][v] = sums[r][v] + load(result + v * kWidth);
      store(result + v * kWidth, sums[r][v]);
    }
  }
}

template <int most, int columns>
FUSEDRES_INLINE void multiply_panel_of(int64_t size, const PlaneProducts& p, const float* a, const float* b,
                                       const float* next, float* result, bool add) {
  if constexpr (most > 1) {
    if (size < most) return multiply_panel_of<most - 1, columns>(size, p, a, b, next, result, add);
  }
  multiply_panel<most, columns>(p, a, b, next, result, add);
}

// The products of all planes. The rows are shared as equally as they can be by tiles of registers.
void multiply_planes(const PlaneProducts& p) {
  const int64_t tiles = (p.rows + kPanel - 1) / kPanel;
  const int64_t whole = p.vectors / kVectorsOfPanel, panels = (p.vectors + kVectorsOfPanel - 1) / kVectorsOfPanel;
  for (int64_t plane = 0; plane < p.planes; ++plane) {
    const float *a = p.a + plane * p.a_plane, *b = p.b + plane * p.b_plane;
    float* result = p.result + plane * p.result_plane;
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = p.rows * tile / tiles, size = p.rows * (tile + 1) / tiles - row;
        const float *mine = b + panel * p.b_panel, *next = panel + 1 < panels ? mine + p.b_panel : b + p.b_plane;
        const float *rows = a + row * p.a_row, *fetched = tile == 0 ? next : mine;
        float* results = result + row * p.result_row + panel * kPanelIn;
        if (panel == whole) {
          multiply_panel_of<kPanel, 1>(size, p, rows, mine, fetched, results, p.add);
        } else {
          multiply_panel_of<kPanel, kVectorsOfPanel>(size, p, rows, mine, fetched, results, p.add);
        }
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
