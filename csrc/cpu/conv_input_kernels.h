// A 1x1 convolution's input gradient: dx[p, i] = sum over o of dy[p, o] * W[o, i], a matrix product in float, added to
// the gradient that reaches x by another way. Included after conv_kernels.h, whose tiles it has.
#pragma once

#include "kernels.h"

namespace {

using namespace fusedres::cpu;

constexpr int64_t kDepth = 512;     // output channels multiplied at once: a panel of W and a tile of dy stay near
constexpr int64_t kRowsAhead = 16;  // rows of W, each in a page of its own
constexpr int64_t kTogether = 8;    // tiles that share a panel of W while it is cached

// Positions [first, first + size) of a block, input channels [channel, channel + lanes), output channels
// [out, out + depth).
struct ProductTile {
  const float* dy;            // of the first position and output channel
  const float* weight;        // [depth, kPanelIn]
  const int64_t* rows;        // [size]: of dx
  int64_t out, depth, channel, lanes;
};

// The row of dx that a position of dy, of N*height.out*width.out, belongs to.
inline int64_t row_of(const ConvInputArgs& args, int64_t position) {
  const ConvAxis &height = args.height, &width = args.width;
  if (height.stride == 1 && width.stride == 1) return position;
  const int64_t line = position / width.out, image = line / height.out;
  const int64_t x_line = image * height.in + line % height.out * height.stride;
  return x_line * width.in + position % width.out * width.stride;
}

// kWidth lanes of what the sum is added to, at an element of dx; `first`: of the first output channels.
inline Float added_to(const ConvInputArgs& args, bool first, int64_t element) {
  if (!first) return load(args.dx + element);
  if (args.shortcut_dy == nullptr) return zero();
  const Float v = load(args.shortcut_dy + element);
  return args.mask == nullptr ? v : select(unpack_bits(args.mask + element / 8), v);
}

inline float added_to_one(const ConvInputArgs& args, bool first, int64_t element) {
  if (!first) return args.dx[element];
  if (args.shortcut_dy == nullptr) return 0;
  const bool kept = args.mask == nullptr || (args.mask[element / 8] >> (element % 8) & 1);
  return kept ? args.shortcut_dy[element] : 0;
}

// fetch: asks for the rows of dy that follow the tile's, which the hardware does not foresee where they are short.
template <int size, bool fetch>
void product(const ConvInputArgs& args, const ProductTile& tile) {
  const bool first = tile.out == 0;
  const float* soon = first && args.shortcut_dy != nullptr ? args.shortcut_dy : args.dx;
  Float sums[size][2];
#pragma GCC unroll 14
  for (int r = 0; r < size; ++r) {
    sums[r][0] = sums[r][1] = zero();
    const float* row = soon + tile.rows[r] * args.in_channels + tile.channel;
    _mm_prefetch(row, _MM_HINT_T0);
    _mm_prefetch(row + tile.lanes - 1, _MM_HINT_T0);
  }
  const int64_t pitch = args.out_channels;
  const float *dy = tile.dy, *weight = tile.weight, *next = dy + size * pitch;
  for (int64_t o = 0; o < tile.depth; ++o, ++dy, weight += kPanelIn) {
    if constexpr (fetch) _mm_prefetch(next + o * size, _MM_HINT_T0);
    const Float low = load(weight), high = load(weight + kWidth);
#pragma GCC unroll 14
    for (int r = 0; r < size; ++r) {
      const Float one = repeat(dy + r * pitch);
      sums[r][0] = fma(one, low, sums[r][0]);
      sums[r][1] = fma(one, high, sums[r][1]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < size; ++r) {  // unrolled, or `sums` would live in memory
    const int64_t element = tile.rows[r] * args.in_channels + tile.channel;
    if (tile.lanes == kPanelIn) {
      const Float low = added_to(args, first, element), high = added_to(args, first, element + kWidth);
      store(args.dx + element, low + sums[r][0]);
      store(args.dx + element + kWidth, high + sums[r][1]);
      continue;
    }
    float row[kPanelIn];
    store(row, sums[r][0]);
    store(row + kWidth, sums[r][1]);
    for (int64_t i = 0; i < tile.lanes; ++i) {
      args.dx[element + i] = added_to_one(args, first, element + i) + row[i];
    }
  }
}

template <int most>
inline void product_of(int64_t size, const ConvInputArgs& args, const ProductTile& tile) {
  if constexpr (most > 1) {
    if (size < most) return product_of<most - 1>(size, args, tile);
  }
  if (tile.channel == 0 && tile.depth == args.out_channels) return product<most, true>(args, tile);
  product<most, false>(args, tile);
}

// W [out_channels, in_channels] as [panel][out_channels][kPanelIn], panels [begin, end); zeros beyond the last channel
void pack_weight(const ConvInputArgs& args, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t channel = panel * kPanelIn, left = args.in_channels - channel;
    float* packed = args.packed_weight + channel * args.out_channels;
    const float* weight = args.weight + channel;
    for (int64_t o = 0; o < args.out_channels; ++o, weight += args.in_channels, packed += kPanelIn) {
      for (int64_t i = 0; i < kPanelIn; i += kLine) {
        _mm_prefetch(weight + kRowsAhead * args.in_channels + i, _MM_HINT_T0);
      }
      pack_position(weight, left < kPanelIn ? left : kPanelIn, 0, packed);
    }
  }
}

// dx of positions [begin, end) of dy
void conv_backward_input(const ConvInputArgs& args, int64_t begin, int64_t end) {
  int64_t rows[kTogether * kPanel];
  const int64_t panels = (args.in_channels + kPanelIn - 1) / kPanelIn;
  for (int64_t block = begin; block < end; block += kTogether * kPanel) {
    const int64_t positions = end - block < kTogether * kPanel ? end - block : kTogether * kPanel;
    const int64_t tiles = count_panels(positions);
    for (int64_t i = 0; i < positions; ++i) rows[i] = row_of(args, block + i);
    for (int64_t out = 0; out < args.out_channels; out += kDepth) {
      const int64_t depth = args.out_channels - out < kDepth ? args.out_channels - out : kDepth;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t channel = panel * kPanelIn, left = args.in_channels - channel;
        const float* weight = args.packed_weight + channel * args.out_channels + out * kPanelIn;
        for (int64_t t = 0; t < tiles; ++t) {
          const Panel some(positions, tiles, t);
          const float* dy = args.dy + (block + some.first) * args.out_channels + out;
          const ProductTile tile{dy, weight, rows + some.first, out, depth, channel, left < kPanelIn ? left : kPanelIn};
          product_of<kPanel>(some.size, args, tile);
        }
      }
    }
  }
}

}  // namespace
