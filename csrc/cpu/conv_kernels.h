// A convolution's weight gradient: dW[o, tap, i] = sum over positions of dy[p, o] * x[p at tap, i], an outer product
// for each position, in float. Included after vec_avx2.h or vec_avx512.h.
#pragma once

#include <cstring>

#include "kernels.h"

namespace {

using namespace fusedres::cpu;

constexpr int kPanel = 6;                  // output channels of a tile: 6 x 2 vectors of sums fill AVX2's registers
constexpr int64_t kPanelIn = 2 * kWidth;   // input channels of a tile
constexpr int64_t kCopied = 8;             // floats copied at once for a panel

// The output positions [first, last) of one axis that a tap reads inside the image.
struct Reach {
  int64_t first, last, offset;  // offset: of the tap, input position = output position * stride + offset
  Reach(const ConvAxis& axis, int64_t tap) : offset(tap * axis.dilation - axis.padding) {
    first = offset >= 0 ? 0 : (axis.stride - 1 - offset) / axis.stride;
    const int64_t room = axis.in - 1 - offset;
    last = room < 0 ? 0 : room / axis.stride + 1;
    if (last > axis.out) last = axis.out;
    if (last < first) last = first;
  }
  int64_t count() const { return last - first; }
};

// f(image row of dy, image row of x) for the output rows [begin, end) of N*out that the tap reads.
template <class F>
inline void for_rows(const ConvAxis& axis, const Reach& reach, int64_t begin, int64_t end, F f) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row % axis.out;
    if (at < reach.first || at >= reach.last) continue;
    f(row, row / axis.out * axis.in + at * axis.stride + reach.offset);
  }
}

// Output channels [first, first + size) of a panel, `panels` of them over `channels`, as equal as they can be.
struct Panel {
  Panel(int64_t channels, int64_t panels, int64_t index)
      : first(channels * index / panels), size(channels * (index + 1) / panels - first) {}
  int64_t first, size;
};

inline int64_t count_panels(int64_t channels) { return (channels + kPanel - 1) / kPanel; }

// `size` floats, of a panel. Copies eight where that many may be read: what lies beyond is overwritten later.
inline void copy_panel(float* packed, const float* dy, int64_t size, bool wide) {
  if (wide) {
    std::memcpy(packed, dy, kCopied * sizeof(float));
  } else {
    for (int64_t i = 0; i < size; ++i) packed[i] = dy[i];
  }
}

// dy of the call's channels as [panel][position][channel of the panel]
void pack_dy(const ConvWeightArgs& args, int64_t channel, int64_t channels, const Reach& rows, const Reach& columns,
             int64_t begin, int64_t end, int64_t positions) {
  const int64_t panels = count_panels(channels);
  for (int64_t p = 0; p < panels; ++p) {
    const Panel panel(channels, panels, p);
    const int64_t first = channel + panel.first;
    const bool wide = first + kCopied <= args.out_channels;
    float* packed = args.packed_dy + panel.first * positions;
    for_rows(args.height, rows, begin, end, [&](int64_t row, int64_t) {
      const float* dy = args.dy + (row * args.width.out + columns.first) * args.out_channels + first;
      for (int64_t i = 0; i < columns.count(); ++i, packed += panel.size, dy += args.out_channels) {
        copy_panel(packed, dy, panel.size, wide);
      }
    });
  }
}

// x of kPanelIn channels as [position][channel]; zeros beyond the last one of the call
void pack_x(const ConvWeightArgs& args, int64_t channel, const Reach& rows, const Reach& columns, int64_t begin,
            int64_t end) {
  const int64_t left = args.last_in - channel, lanes = left < kPanelIn ? left : kPanelIn;
  float* packed = args.packed_x;
  for_rows(args.height, rows, begin, end, [&](int64_t, int64_t row) {
    for (int64_t column = columns.first; column < columns.last; ++column, packed += kPanelIn) {
      const int64_t at = row * args.width.in + column * args.width.stride + columns.offset;
      const float* x = args.x + at * args.in_channels + channel;
      if (lanes == kPanelIn) {
        store(packed, load(x));
        store(packed + kWidth, load(x + kWidth));
      } else {
        for (int64_t i = 0; i < kPanelIn; ++i) packed[i] = i < lanes ? x[i] : 0;
      }
    }
  });
}

// dw[r, 0..lanes) += sum over positions of dy[p, r] * x[p, :]; dw has rows `stride` apart.
template <int size>
void outer_products(const float* dy, const float* x, int64_t positions, float* dw, int64_t stride, int64_t lanes) {
  Float sums[size][2];
#pragma GCC unroll 6
  for (int r = 0; r < size; ++r) sums[r][0] = sums[r][1] = zero();
  for (int64_t p = 0; p < positions; ++p) {
    const Float low = load(x + p * kPanelIn), high = load(x + p * kPanelIn + kWidth);
#pragma GCC unroll 6
    for (int r = 0; r < size; ++r) {
      const Float d = repeat(dy + p * size + r);
      sums[r][0] = fma(d, low, sums[r][0]);
      sums[r][1] = fma(d, high, sums[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < size; ++r, dw += stride) {  // unrolled, or `sums` would live in memory
    if (lanes == kPanelIn) {
      store(dw, load(dw) + sums[r][0]);
      store(dw + kWidth, load(dw + kWidth) + sums[r][1]);
      continue;
    }
    float row[kPanelIn];
    store(row, sums[r][0]);
    store(row + kWidth, sums[r][1]);
    for (int64_t i = 0; i < lanes; ++i) dw[i] += row[i];
  }
}

void outer_products(int64_t size, const float* dy, const float* x, int64_t positions, float* dw, int64_t stride,
                    int64_t lanes) {
  switch (size) {
    case 1: return outer_products<1>(dy, x, positions, dw, stride, lanes);
    case 2: return outer_products<2>(dy, x, positions, dw, stride, lanes);
    case 3: return outer_products<3>(dy, x, positions, dw, stride, lanes);
    case 4: return outer_products<4>(dy, x, positions, dw, stride, lanes);
    case 5: return outer_products<5>(dy, x, positions, dw, stride, lanes);
    default: return outer_products<6>(dy, x, positions, dw, stride, lanes);
  }
}

// dw of output channels [channel, channel + channels) and input channels [first_in, last_in) at taps [tap, last_tap):
// rows of dy in pieces whose copies stay in the cache, each piece summed in registers and then added to dw.
void conv_backward_weight(const ConvWeightArgs& args, int64_t channel, int64_t channels, int64_t tap,
                          int64_t last_tap) {
  const int64_t rows = args.batch * args.height.out, taps = args.height.kernel * args.width.kernel;
  const int64_t panels = count_panels(channels), stride = taps * args.in_channels;
  for (int64_t begin = 0; begin < rows; begin += args.piece) {
    const int64_t end = begin + args.piece < rows ? begin + args.piece : rows;
    for (int64_t t = tap; t < last_tap; ++t) {
      const Reach down(args.height, t / args.width.kernel), across(args.width, t % args.width.kernel);
      int64_t positions = 0;
      for_rows(args.height, down, begin, end, [&](int64_t, int64_t) { positions += across.count(); });
      if (positions == 0) continue;
      pack_dy(args, channel, channels, down, across, begin, end, positions);
      for (int64_t i = args.first_in; i < args.last_in; i += kPanelIn) {
        pack_x(args, i, down, across, begin, end);
        const int64_t left = args.last_in - i, lanes = left < kPanelIn ? left : kPanelIn;
        for (int64_t p = 0; p < panels; ++p) {
          const Panel panel(channels, panels, p);
          float* dw = args.dw + (channel + panel.first) * stride + t * args.in_channels + i;
          outer_products(panel.size, args.packed_dy + panel.first * positions, args.packed_x, positions, dw, stride,
                         lanes);
        }
      }
    }
  }
}

}  // namespace
