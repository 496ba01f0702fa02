// Winograd's 3x3 convolutions: the transforms of tiles and weights, and the products between them. Included after
// vec_avx2.h or vec_avx512.h.
//
// A transformed value has a plane for each of the (m + 2)^2 places in a tile: [plane][tile][channel], or for the weight
// [plane][panel of results][channel summed][kPanelIn].
#pragma once

#include "lanes.h"
#include "select.h"
#include "tiles.h"
#include "winograd_tiles.h"

namespace {

using namespace fusedres::cpu;

// A tile's image and the first row and column of its results.
struct TilePlace {
  int64_t image, row, column;
};

// Calls f(index, place) for tiles [begin, end) with results of `outputs` a side.
template <class F>
FUSEDRES_INLINE void for_tiles(const TiledImages& images, int64_t outputs, int64_t begin, int64_t end, F f) {
  const int64_t tiles = images.down * images.across;
  int64_t image = begin / tiles, down = begin % tiles / images.across, across = begin % images.across;
  for (int64_t i = 0; i < end - begin; ++i) {
    f(i, TilePlace{image, down * outputs, across * outputs});
    if (++across < images.across) continue;
    across = 0;
    if (++down < images.down) continue;
    down = 0;
    ++image;
  }
}

// Transforms one tile of `size` x `size` values that begins at `place`, which may lie outside. Values outside are 0,
// after the prologue too. inside: none is outside.
template <int size, int to, bool activated, bool inside, class Transform>
FUSEDRES_INLINE void transform_tile(const TransformArgs& args, TilePlace place, float* transformed,
                                    Transform transform) {
  const TiledImages& images = args.images;
  const int64_t row = images.width * images.channels, channels = images.channels;
  const float* first = args.x + ((place.image * images.height + place.row) * images.width + place.column) * channels;
  const float* at[size * size];
  bool within[size * size];
  if constexpr (!inside) {
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < size; ++j) {
        const int64_t y = place.row + i, x = place.column + j;
        const bool is = y >= 0 && y < images.height && x >= 0 && x < images.width;
        within[i * size + j] = is;
        at[i * size + j] = is ? first + i * row + j * channels : args.zeros;
      }
    }
  }
  for (int64_t c = 0; c < args.padded; c += kWidth) {
    const int64_t lanes = channels - c;
    Float scale, shift;
    if constexpr (activated) {
      scale = load_lanes(args.scale + c, lanes);
      shift = load_lanes(args.shift + c, lanes);
    }
    const auto transformed_at = [&](auto whole) {
      in_two_dimensions<size, to>(
          transform,
          [&](int i, int j) {
            const float* p = (inside ? first + i * row + j * channels : at[i * size + j]) + c;
            Float v = decltype(whole)::value ? load(p) : load_lanes(p, lanes);
            if constexpr (activated) {
              v = relu(fma(v, scale, shift));
              if (!inside && !within[i * size + j]) v = zero();
            }
            return v;
          },
          [&](int i, int j, Float v) { store(transformed + (i * to + j) * args.plane + c, v); });
    };
    lanes >= kWidth ? transformed_at(Constant<true>{}) : transformed_at(Constant<false>{});
  }
}

// B^T x B of tiles [begin, end).
template <class Tile>
void transform_input(const TransformArgs& args, int64_t begin, int64_t end) {
  constexpr int size = Tile::kInputs;
  const TiledImages& images = args.images;
  for_tiles(images, Tile::kOutputs, begin, end, [&](int64_t i, TilePlace place) {
    place.row -= 1;
    place.column -= 1;
    const bool inside =
        place.row >= 0 && place.column >= 0 && place.row + size <= images.height && place.column + size <= images.width;
    float* transformed = args.transformed + i * args.row;
    with(args.scale != nullptr, [&](auto activated) {
      with(inside, [&](auto within) {
        transform_tile<size, size, decltype(activated)::value, decltype(within)::value>(args, place, transformed,
                                                                                        Tile::input);
      });
    });
  });
}

// A dy A^T of tiles [begin, end).
template <class Tile>
void transform_output_gradient(const TransformArgs& args, int64_t begin, int64_t end) {
  constexpr int size = Tile::kOutputs;
  const TiledImages& images = args.images;
  for_tiles(images, size, begin, end, [&](int64_t i, TilePlace place) {
    const bool inside = place.row + size <= images.height && place.column + size <= images.width;
    with(inside, [&](auto within) {
      transform_tile<size, Tile::kInputs, false, decltype(within)::value>(args, place, args.transformed + i * args.row,
                                                                          Tile::output_gradient);
    });
  });
}

// G w G^T for one input channel summed and up to kWidth results.
template <class Tile, class Read>
FUSEDRES_INLINE void transform_taps(Read read, float* transformed, int64_t plane) {
  in_two_dimensions<3, Tile::kInputs>(
      Tile::weight, read, [&](int i, int j, Float v) { store(transformed + (i * Tile::kInputs + j) * plane, v); });
}

// The forward's weight: results are output channels, which lie apart in memory. kWidth x kWidth pieces are transposed.
template <class Tile>
void transform_weight(const WinogradWeightArgs& args, int64_t begin, int64_t end) {
  const int64_t depth = args.last - args.first;
  for (int64_t at = begin * kPanelIn; at < end * kPanelIn; at += kWidth) {
    float* panel = args.transformed + (at / kPanelIn - begin) * args.panel + at % kPanelIn;
    for (int64_t c = 0; c < depth; c += kWidth) {
      const int64_t lanes = depth - c < kWidth ? depth - c : kWidth;
      Float taps[9][kWidth];
      for (int64_t tap = 0; tap < 9; ++tap) {
        for (int64_t i = 0; i < kWidth; ++i) {
          const float* w = args.weight + ((at + i) * 9 + tap) * args.in_channels + args.first + c;
          taps[tap][i] = at + i < args.out_channels ? load_lanes(w, lanes) : zero();
        }
        transpose(taps[tap]);
      }
      for (int64_t i = 0; i < lanes; ++i) {
        transform_taps<Tile>([&](int row, int column) { return taps[row * 3 + column][i]; }, panel + (c + i) * kPanelIn,
                             args.plane);
      }
    }
  }
}

// The input gradient's weight: results are input channels, the taps in reverse.
template <class Tile>
void transform_weight_reversed(const WinogradWeightArgs& args, int64_t begin, int64_t end) {
  for (int64_t o = args.first; o < args.last; ++o) {
    const float* weight = args.weight + o * 9 * args.in_channels;
    for (int64_t at = begin * kPanelIn; at < end * kPanelIn; at += kWidth) {
      const int64_t lanes = args.in_channels - at;
      transform_taps<Tile>(
          [&](int i, int j) { return load_lanes(weight + (8 - i * 3 - j) * args.in_channels + at, lanes); },
          args.transformed + (at / kPanelIn - begin) * args.panel + (o - args.first) * kPanelIn + at % kPanelIn,
          args.plane);
    }
  }
}

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

// What becomes of a result of the convolution before it is stored.
struct Finish {
  const WinogradOutputArgs& args;
  Float scale, shift, residual_scale, residual_shift;

  Finish(const WinogradOutputArgs& args, int64_t c, int64_t lanes) : args(args) {
    if (args.scale == nullptr) return;
    scale = load_lanes(args.scale + c, lanes);
    shift = load_lanes(args.shift + c, lanes);
    if (args.residual_scale == nullptr) return;
    residual_scale = load_lanes(args.residual_scale + c, lanes);
    residual_shift = load_lanes(args.residual_shift + c, lanes);
  }

  template <bool whole>
  FUSEDRES_INLINE Float operator()(Float v, int64_t element, int64_t lanes) const {
    const auto other = [&](const float* t) { return whole ? load(t + element) : load_lanes(t + element, lanes); };
    if (args.scale != nullptr) {
      v = fma(v, scale, shift);
      if (args.residual != nullptr) {
        const Float r = other(args.residual);
        v = v + (args.residual_scale == nullptr ? r : fma(residual_scale, r, residual_shift));
      }
      if (args.relu) v = relu(v);
    } else if (args.residual != nullptr) {
      const Float r = other(args.residual);
      v = v + (args.mask == nullptr ? r : select(unpack_bits_lanes(args.mask + element / 8, lanes), r));
    }
    return v;
  }
};

// A^T m A of one tile for kWidth channels, and what follows. partial: some results lie outside the image.
template <class Tile, bool plain, bool partial>
FUSEDRES_INLINE void finish_tile(const WinogradOutputArgs& args, TilePlace place, const float* products, int64_t c,
                                 const Finish& finish, Float& finite) {
  constexpr int size = Tile::kOutputs;
  const TiledImages& images = args.images;
  const int64_t lanes = images.channels - c;
  const int64_t first = ((place.image * images.height + place.row) * images.width + place.column) * images.channels + c;
  const int64_t rows = images.height - place.row, columns = images.width - place.column;
  Float y[size][size];
  Float columns_done[size][Tile::kInputs];
  FUSEDRES_UNROLLED
  for (int j = 0; j < Tile::kInputs; ++j) {
    Float m[Tile::kInputs], after[size];
    FUSEDRES_UNROLLED
    for (int i = 0; i < Tile::kInputs; ++i) m[i] = load(products + (i * Tile::kInputs + j) * args.plane);
    Tile::output(m, after);
    FUSEDRES_UNROLLED
    for (int i = 0; i < size; ++i) columns_done[i][j] = after[i];
  }
  FUSEDRES_UNROLLED
  for (int i = 0; i < size; ++i) Tile::output(columns_done[i], y[i]);
  const auto inside = [&](int i, int j) { return !partial || (i < rows && j < columns); };
  if (args.moments != nullptr) {  // of this tile's own mean, so that a large mean costs no digits
    Float sum = zero(), squares = zero();
    FUSEDRES_UNROLLED
    for (int i = 0; i < size; ++i) {
      FUSEDRES_UNROLLED
      for (int j = 0; j < size; ++j) {
        if (inside(i, j)) sum = sum + y[i][j];
      }
    }
    const int64_t count = partial ? (rows < size ? rows : size) * (columns < size ? columns : size) : size * size;
    const Float mean = sum * set(1.0f / float(count));
    Float left = zero();  // sum of y - mean, which rounding leaves
    FUSEDRES_UNROLLED
    for (int i = 0; i < size; ++i) {
      FUSEDRES_UNROLLED
      for (int j = 0; j < size; ++j) {
        if (!inside(i, j)) continue;
        const Float d = y[i][j] - mean;
        left = left + d;
        squares = fma(d, d, squares);
      }
    }
    add_product_to_double(args.moments + c, double(count), mean, set(1.0f));
    add_to_double(args.moments + c, left);
    add_product_to_double(args.moments + args.row + c, double(count), mean, mean);
    add_to_double(args.moments + args.row + c, squares + (left + left) * mean);
  }
  FUSEDRES_UNROLLED
  for (int i = 0; i < size; ++i) {
    FUSEDRES_UNROLLED
    for (int j = 0; j < size; ++j) {
      if (!inside(i, j)) continue;
      const int64_t element = first + (i * images.width + j) * images.channels;
      const Float v = y[i][j];
      finite = fma(v, zero(), finite);
      if (lanes >= kWidth) {
        store(args.y + element, plain ? v : finish.template operator()<true>(v, element, lanes));
      } else {
        store_lanes(args.y + element, plain ? v : finish.template operator()<false>(v, element, lanes), lanes);
      }
    }
  }
}

// Returns whether every result of the convolution was finite.
template <class Tile>
bool transform_output(const WinogradOutputArgs& args, int64_t begin, int64_t end) {
  constexpr int size = Tile::kOutputs;
  const TiledImages& images = args.images;
  Float finite = zero();
  const bool plain = args.scale == nullptr && args.residual == nullptr;
  for (int64_t c = args.first; c < args.last; c += kWidth) {
    const Finish finish(args, c, images.channels - c);
    const float* products = args.products + (c - args.first);
    for_tiles(images, size, begin, end, [&](int64_t i, TilePlace place) {
      const bool partial = place.row + size > images.height || place.column + size > images.width;
      with(plain, [&](auto is_plain) {
        with(partial, [&](auto is_partial) {
          finish_tile<Tile, decltype(is_plain)::value, decltype(is_partial)::value>(
              args, place, products + i * args.products_row, c, finish, finite);
        });
      });
    });
  }
  return !any(is_nan(finite));
}

// G^T m G of output channels [begin, end), the sum of `copies` of m. Returns whether every gradient was finite.
template <class Tile>
bool transform_weight_gradient(const WinogradGradientArgs& args, int64_t begin, int64_t end) {
  Float finite = zero();
  for (int64_t o = begin; o < end; ++o) {
    for (int64_t c = 0; c < args.last - args.first; c += kWidth) {
      const int64_t lanes = args.last - args.first - c;
      const float* products = args.products + (o - args.first_out) * args.products_row + c;
      float* dw = args.dw + o * 9 * args.in_channels + args.first + c;
      Float columns[3][Tile::kInputs];
      FUSEDRES_UNROLLED
      for (int j = 0; j < Tile::kInputs; ++j) {
        Float m[Tile::kInputs], after[3];
        FUSEDRES_UNROLLED
        for (int i = 0; i < Tile::kInputs; ++i) {
          const float* at = products + (i * Tile::kInputs + j) * args.plane;
          m[i] = load(at);
          for (int64_t copy = 1; copy < args.copies; ++copy) m[i] = m[i] + load(at + copy * args.copy);
        }
        Tile::weight_gradient(m, after);
        FUSEDRES_UNROLLED
        for (int i = 0; i < 3; ++i) columns[i][j] = after[i];
      }
      FUSEDRES_UNROLLED
      for (int i = 0; i < 3; ++i) {
        Float after[3];
        Tile::weight_gradient(columns[i], after);
        FUSEDRES_UNROLLED
        for (int j = 0; j < 3; ++j) {
          finite = fma(after[j], zero(), finite);
          store_lanes(dw + (i * 3 + j) * args.in_channels, after[j], lanes);
        }
      }
    }
  }
  return !any(is_nan(finite));
}

template <class Tile>
constexpr WinogradKernels winograd_of() {
  return {Tile::kOutputs,           Tile::kInputs * Tile::kInputs,
          ::transform_input<Tile>,  ::transform_output_gradient<Tile>,
          ::transform_weight<Tile>, ::transform_weight_reversed<Tile>,
          ::transform_output<Tile>, ::transform_weight_gradient<Tile>};
}

}  // namespace
