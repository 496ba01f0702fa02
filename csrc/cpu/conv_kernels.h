// A convolution's weight gradient: dW[o, tap, i] = sum over positions of dy[p, o] * x[p at tap, i], an outer product
// for each position, in float. Included after vec_avx2.h or vec_avx512.h.
#pragma once

#include <cstring>

#include "kernels.h"
#include "tiles.h"

namespace {

using namespace fusedres::cpu;

constexpr int64_t kCopied = kWidth == 8 ? 8 : 16;  // floats copied at once for a panel, at least kPanel
constexpr int64_t kAhead = 8;  // positions of x, which the hardware does not foresee beyond a page

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
};

// f(row of dy, row of x) for the piece's rows that the tap reads.
template <class F>
inline void for_rows(const ConvWeightArgs& args, const Reach& reach, F f) {
  const ConvAxis& axis = args.height;
  for (int64_t row = args.begin; row < args.end; ++row) {
    const int64_t at = row % axis.out;
    if (at < reach.first || at >= reach.last) continue;
    f(row, row / axis.out * axis.in + at * axis.stride + reach.offset);
  }
}

// Output channels [first, first + size) of a panel, `panels` of them over `channels`, as equal as they can be.
struct Panel {
  Panel(int64_t channels, int64_t panels, int64_t index)
      : first(channels * index / panels), size(channels * (index + 1) / panels - first), slack(index * kCopied) {}
  // where its copy begins
  float* in(float* packed, int64_t positions) const { return packed + first * positions + slack; }
  int64_t first, size, slack;
};

inline int64_t count_panels(int64_t channels) { return (channels + kPanel - 1) / kPanel; }

// The first `size` of kCopied floats. Copies all of them where they may be read: what lies beyond is overwritten.
inline void copy_panel(float* packed, const float* dy, int64_t size, bool wide) {
  if (wide) {
    std::memcpy(packed, dy, kCopied * sizeof(float));
  } else {
    for (int64_t i = 0; i < size; ++i) packed[i] = dy[i];
  }
}

// dy of the call's channels as [panel][position][channel of the panel], row by row: each is read while it is cached.
void pack_dy(const ConvWeightArgs& args) {
  const int64_t channels = args.last_out - args.first_out, panels = count_panels(channels);
  const int64_t columns = args.width.out, positions = (args.end - args.begin) * columns;
  for (int64_t row = args.begin; row < args.end; ++row) {
    for (int64_t p = 0; p < panels; ++p) {
      const Panel panel(channels, panels, p);
      const int64_t first = args.first_out + panel.first;
      const bool wide = first + kCopied <= args.out_channels;
      const float* dy = args.dy + row * columns * args.out_channels + first;
      float* packed = panel.in(args.packed_dy, positions) + (row - args.begin) * columns * panel.size;
      const float* soon = args.dy + (row + 1) * columns * args.out_channels + args.first_out + p * kLine;
      const bool fetch = p * kLine < channels;
      for (int64_t i = 0; i < columns; ++i, packed += panel.size, dy += args.out_channels, soon += args.out_channels) {
        if (fetch) _mm_prefetch(soon, _MM_HINT_T0);
        copy_panel(packed, dy, panel.size, wide);
      }
    }
  }
}

// Columns of x are packed by their remainder to the stride, so that those of a tap follow each other.
struct Columns {
  explicit Columns(const ConvAxis& axis) : axis(axis), each((axis.in + axis.stride - 1) / axis.stride) {}
  int64_t count() const { return each * axis.stride; }
  int64_t at(int64_t column) const { return column % axis.stride * each + column / axis.stride; }
  bool are_read(int64_t remainder) const {
    for (int64_t tap = 0; tap < axis.kernel; ++tap) {
      if ((tap * axis.dilation - axis.padding - remainder) % axis.stride == 0) return true;
    }
    return false;
  }
  const ConvAxis& axis;
  int64_t each;
};

// Rows of x, with one tap along the height, stand where those of dy do, else where they do in the image.
inline bool by_dy(const ConvWeightArgs& args) { return args.height.kernel == 1; }

// Floats of a panel of the packed x.
inline int64_t panel_pitch(const ConvWeightArgs& args) {
  const int64_t rows = by_dy(args) ? args.end - args.begin : args.x_end - args.x_begin;
  return rows * Columns(args.width).count() * kPanelIn;
}

// `channels` of one position of x to its panels, `pitch` floats apart; zeros beyond the last channel
inline void pack_position(const float* x, int64_t channels, int64_t pitch, float* packed) {
  for (int64_t left = channels; left > 0; left -= kPanelIn, x += kPanelIn, packed += pitch) {
    if (left >= kPanelIn) {
      store(packed, load(x));
      store(packed + kWidth, load(x + kWidth));
    } else {
      for (int64_t lane = 0; lane < kPanelIn; ++lane) packed[lane] = lane < left ? x[lane] : 0;
    }
  }
}

// x of `channels` from `channel` on as [panel][row][column][channel of the panel]
void pack_x(const ConvWeightArgs& args, int64_t channel, int64_t channels) {
  const Columns columns(args.width);
  const int64_t step = args.width.stride, pitch = panel_pitch(args);
  const auto pack = [&](int64_t row, int64_t packed_row) {
    const float* x_row = args.x + row * args.width.in * args.in_channels + channel;
    for (int64_t remainder = 0; remainder < step; ++remainder) {
      if (!columns.are_read(remainder)) continue;
      float* packed = args.packed_x + (packed_row * columns.count() + columns.at(remainder)) * kPanelIn;
      for (int64_t column = remainder; column < args.width.in; column += step, packed += kPanelIn) {
        const float *x = x_row + column * args.in_channels, *soon = x + kAhead * step * args.in_channels;
        for (int64_t i = 0; i < channels; i += kLine) _mm_prefetch(soon + i, _MM_HINT_T0);
        pack_position(x, channels, pitch, packed);
      }
    }
  };
  if (by_dy(args)) {
    for_rows(args, Reach(args.height, 0), [&](int64_t row, int64_t x_row) { pack(x_row, row - args.begin); });
  } else {
    for (int64_t row = args.x_begin; row < args.x_end; ++row) pack(row, row - args.x_begin);
  }
}

// The stretches of the piece that a tap reads, in packed x; those that follow each other in memory are one.
int64_t find_stretches(const ConvWeightArgs& args, const float* packed_x, int64_t tap) {
  const Reach down(args.height, tap / args.width.kernel), across(args.width, tap % args.width.kernel);
  const int64_t length = across.last - across.first;
  if (length == 0) return 0;
  const Columns columns(args.width);
  const int64_t column = columns.at(across.first * args.width.stride + across.offset);
  Stretch* end = args.stretches;
  for_rows(args, down, [&](int64_t row, int64_t x_row) {
    const int64_t packed_row = by_dy(args) ? row - args.begin : x_row - args.x_begin;
    const float* x = packed_x + (packed_row * columns.count() + column) * kPanelIn;
    const int64_t position = (row - args.begin) * args.width.out + across.first;
    if (end > args.stretches) {
      Stretch& last = end[-1];
      if (last.position + last.positions == position && last.x + last.positions * kPanelIn == x) {
        last.positions += length;
        return;
      }
    }
    *end++ = {x, position, length};
  });
  return end - args.stretches;
}

// dw[r, 0..lanes) += sum over positions of dy[p, r] * x[p, :]; dw has rows `stride` apart.
template <int size>
void outer_products(const Stretch* stretches, int64_t count, const float* dy, float* dw, int64_t stride,
                    int64_t lanes) {
  Float sums[size][2];
#pragma GCC unroll 14
  for (int r = 0; r < size; ++r) {
    sums[r][0] = sums[r][1] = zero();
    _mm_prefetch(dw + r * stride, _MM_HINT_T0);
    _mm_prefetch(dw + r * stride + kPanelIn - 1, _MM_HINT_T0);
  }
  for (int64_t s = 0; s < count; ++s) {
    const Stretch& stretch = stretches[s];
    const float *x = stretch.x, *d = dy + stretch.position * size;
    for (int64_t p = 0; p < stretch.positions; ++p, x += kPanelIn, d += size) {
      const Float low = load(x), high = load(x + kWidth);
#pragma GCC unroll 14
      for (int r = 0; r < size; ++r) {
        const Float one = repeat(d + r);
        sums[r][0] = fma(one, low, sums[r][0]);
        sums[r][1] = fma(one, high, sums[r][1]);
      }
    }
  }
#pragma GCC unroll 14
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

// `outer_products` of a panel's size, 1 to `most`.
template <int most>
inline void outer_products_of(int64_t size, const Stretch* stretches, int64_t count, const float* dy, float* dw,
                              int64_t stride, int64_t lanes) {
  if constexpr (most > 1) {
    if (size < most) return outer_products_of<most - 1>(size, stretches, count, dy, dw, stride, lanes);
  }
  outer_products<most>(stretches, count, dy, dw, stride, lanes);
}

// What the piece adds to dw of input channels [channel, channel + lanes), one panel at `packed_x`.
void add_panel(const ConvWeightArgs& args, const float* packed_x, int64_t channel, int64_t lanes) {
  const int64_t channels = args.last_out - args.first_out, panels = count_panels(channels);
  const int64_t positions = (args.end - args.begin) * args.width.out;
  const int64_t stride = args.height.kernel * args.width.kernel * args.in_channels;
  for (int64_t tap = args.first_tap; tap < args.last_tap; ++tap) {
    const int64_t count = find_stretches(args, packed_x, tap);
    if (count == 0) continue;
    for (int64_t p = 0; p < panels; ++p) {
      const Panel panel(channels, panels, p);
      float* dw = args.dw + (args.first_out + panel.first) * stride + tap * args.in_channels + channel;
      outer_products_of<kPanel>(panel.size, args.stretches, count, panel.in(args.packed_dy, positions), dw, stride,
                                lanes);
    }
  }
}

void conv_backward_weight(const ConvWeightArgs& args) {
  pack_dy(args);
  for (int64_t first = args.first_in; first < args.last_in; first += kPackedIn) {
    const int64_t last = args.last_in - first < kPackedIn ? args.last_in : first + kPackedIn;
    pack_x(args, first, last - first);
    const float* packed_x = args.packed_x;
    for (int64_t i = first; i < last; i += kPanelIn, packed_x += panel_pitch(args)) {
      add_panel(args, packed_x, i, last - i < kPanelIn ? last - i : kPanelIn);
    }
  }
}

}  // namespace
