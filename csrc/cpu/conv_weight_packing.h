// Packed copies of the operands of a convolution's weight gradient: a piece of dy, and the part of x that its taps
// read. Included after vec_avx2.h or vec_avx512.h.
#pragma once

#include "kernels.h"
#include "words.h"

namespace {

using namespace fusedres::cpu;

constexpr int64_t kAhead = 8;  // positions of x to prefetch: the hardware does not foresee them beyond a page

// The output positions [first, last) of one axis that a tap reads inside the image.
struct Reach {
  int64_t first, last, offset;  // the tap reads input position = output position * stride + offset
  Reach(const ConvAxis& axis, int64_t tap) : offset(tap * axis.dilation - axis.padding) {
    first = offset >= 0 ? 0 : (axis.stride - 1 - offset) / axis.stride;
    const int64_t room = axis.in - 1 - offset;
    last = room < 0 ? 0 : room / axis.stride + 1;
    if (last > axis.out) last = axis.out;
    if (last < first) last = first;
  }
};

// Calls f(row of dy, row of x) for the piece's rows that the tap reads.
template <class F>
inline void for_rows(const ConvWeightArgs& args, const Reach& reach, F f) {
  const ConvAxis& axis = args.height;
  for (int64_t row = args.begin; row < args.end; ++row) {
    const int64_t at = row % axis.out;
    if (at < reach.first || at >= reach.last) continue;
    f(row, row / axis.out * axis.in + at * axis.stride + reach.offset);
  }
}

// Output channels [first, first + size) of panel number `index`. `panels` panels share `channels` as equally as they
// can.
struct Panel {
  Panel(int64_t channels, int64_t panels, int64_t index)
      : first(channels * index / panels), size(channels * (index + 1) / panels - first) {}
  int64_t first, size;
};

inline int64_t count_panels(int64_t channels) { return (channels + kPanel - 1) / kPanel; }

// Whether dy has the positions of x.
inline bool pointwise(const ConvWeightArgs& args) {
  const auto one = [](const ConvAxis& axis) { return axis.kernel == 1 && axis.stride == 1 && axis.padding == 0; };
  return one(args.height) && one(args.width);
}

// The bits that are 0 in the number of a position where a pair may begin. A pair may begin at every position, and
// only at every second position where the piece is one stretch.
template <class T>
inline int64_t bits_within_pair(const ConvWeightArgs& args) {
  return pointwise(args) ? kPerWord<T> - 1 : 0;
}

// Packs dy of the call's channels as [panel][position][kWidth], row by row: a row stays cached for all of its panels.
// A word of bfloat16 pairs a position with the next position, so that a pair may begin anywhere.
template <class T>
void pack_dy(const ConvWeightArgs& args) {
  const int64_t channels = args.last_out - args.first_out, panels = count_panels(channels), pitch = args.out_channels;
  const int64_t columns = args.width.out, positions = (args.end - args.begin) * columns;
  const int64_t within = bits_within_pair<T>(args);
  for (int64_t row = args.begin; row < args.end; ++row) {
    const int64_t at = (row - args.begin) * columns;
    const T* dy_row = static_cast<const T*>(args.dy) + row * columns * pitch;
    const int64_t paired = row + 1 < args.end ? columns : columns - 1;  // the piece's last position has no next one
    for (int64_t p = 0; p < panels; ++p) {
      const Panel panel(channels, panels, p);
      const int64_t first = args.first_out + panel.first;
      const int64_t lanes = first + kWidth <= pitch ? kWidth : panel.size;  // beyond the last channel nothing is read
      const T *dy = dy_row + first, *soon = dy_row + columns * pitch + args.first_out + p * kLine<T>;
      float* packed = args.packed_dy + (p * positions + at) * kWidth;
      const bool fetch = p * kLine<T> < channels;
      for (int64_t i = 0; i < columns; ++i, packed += kWidth, dy += pitch, soon += pitch) {
        if (fetch) _mm_prefetch(soon, _MM_HINT_T0);
        if (((at + i) & within) == 0) store(packed, words(dy, i < paired ? pitch : 0, lanes));
      }
    }
  }
}

// Columns of x are packed by their remainder to the stride, so that the columns of a tap follow each other.
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

// Whether packed rows of x are numbered by the rows of dy that read them, as with one tap along the height. Else they
// are numbered as in the image.
inline bool by_dy(const ConvWeightArgs& args) { return args.height.kernel == 1; }

// How many floats a panel of the packed x has.
inline int64_t panel_pitch(const ConvWeightArgs& args) {
  const int64_t rows = by_dy(args) ? args.end - args.begin : args.x_end - args.x_begin;
  return rows * Columns(args.width).count() * kPanelIn;
}

// Packs `channels` of a position of x, paired with the position `pitch` further, to panels that lie `panel` floats
// apart.
template <class T>
inline void pack_position(const T* x, int64_t pitch, int64_t channels, int64_t panel, float* packed) {
  for (int64_t left = channels; left > 0; left -= kPanelIn, x += kPanelIn, packed += panel) {
    store_words(packed, x, pitch, left);
  }
}

// Packs `channels` of x from `channel` on as [panel][row][column][channel of the panel]. A word of bfloat16 pairs a
// position with the position that is packed next.
template <class T>
void pack_x(const ConvWeightArgs& args, int64_t channel, int64_t channels) {
  const Columns columns(args.width);
  const int64_t step = args.width.stride, panel = panel_pitch(args);
  const int64_t within = bits_within_pair<T>(args) * kPanelIn;
  const T* before = nullptr;
  float* packed_before = nullptr;
  const auto pack = [&](int64_t row, int64_t packed_row) {
    const T* x_row = static_cast<const T*>(args.x) + row * args.width.in * args.in_channels + channel;
    for (int64_t remainder = 0; remainder < step; ++remainder) {
      if (!columns.are_read(remainder)) continue;
      float* packed = args.packed_x + (packed_row * columns.count() + columns.at(remainder)) * kPanelIn;
      for (int64_t column = remainder; column < args.width.in; column += step, packed += kPanelIn) {
        const T *x = x_row + column * args.in_channels, *soon = x + kAhead * step * args.in_channels;
        for (int64_t i = 0; i < channels; i += kLine<T>) _mm_prefetch(soon + i, _MM_HINT_T0);
        if (before != nullptr && ((packed_before - args.packed_x) & within) == 0) {
          pack_position(before, x - before, channels, panel, packed_before);
        }
        before = x;
        packed_before = packed;
      }
    }
  };
  if (by_dy(args)) {
    for_rows(args, Reach(args.height, 0), [&](int64_t row, int64_t x_row) { pack(x_row, row - args.begin); });
  } else {
    for (int64_t row = args.x_begin; row < args.x_end; ++row) pack(row, row - args.x_begin);
  }
  if (before != nullptr) pack_position(before, 0, channels, panel, packed_before);
}

}  // namespace
