// Winograd's 3x3 convolutions: from products to results, and what is fused to them. Included after vec_avx2.h or
// vec_avx512.h.
#pragma once

#include "winograd_inputs.h"

namespace {

using namespace fusedres::cpu;

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
  in_two_dimensions<Tile::kInputs, size>(
      Tile::output, [&](int i, int j) { return load(products + (i * Tile::kInputs + j) * args.plane); },
      [&](int i, int j, Float v) { y[i][j] = v; });
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
      in_two_dimensions<Tile::kInputs, 3>(
          Tile::weight_gradient,
          [&](int i, int j) {
            const float* at = products + (i * Tile::kInputs + j) * args.plane;
            Float sum = load(at);
            for (int64_t copy = 1; copy < args.copies; ++copy) sum = sum + load(at + copy * args.copy);
            return sum;
          },
          [&](int i, int j, Float v) {
            finite = fma(v, zero(), finite);
            store_lanes(dw + (i * 3 + j) * args.in_channels, v, lanes);
          });
    }
  }
  return !any(is_nan(finite));
}

}  // namespace
