// Winograd's 3x3 convolutions: the transforms of what is multiplied. Included after vec_avx2.h or vec_avx512.h.
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

}  // namespace
