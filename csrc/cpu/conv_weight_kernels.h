// A convolution's weight gradient: dW[o, tap, i] = sum over positions of dy[p, o] * x[p at tap, i], in float. Each
// position adds an outer product; bfloat16 adds two positions at once. Included after vec_avx2.h or vec_avx512.h.
#pragma once

#include "conv_weight_packing.h"

namespace {

using namespace fusedres::cpu;

// Lines of memory to prefetch, one a position: the next piece is packed from them.
struct Soon {
  const char* line;
  int64_t pitch;
};

// The lines that call number `index` for this piece prefetches while it multiplies.
template <class T>
Soon soon(const ConvWeightArgs& args, int64_t index) {
  const auto count = [](int64_t channels) { return (channels + kLine<T> - 1) / kLine<T> * kPerWord<T>; };
  const auto find = [&](const void* tensor, int64_t channels, int64_t first, int64_t i) {
    const int64_t position = args.end * args.width.out + i % kPerWord<T>;
    const T* line = static_cast<const T*>(tensor) + position * channels + first + i / kPerWord<T> * kLine<T>;
    return Soon{reinterpret_cast<const char*>(line), channels * int64_t(sizeof(T))};
  };
  const int64_t lines_of_dy = count(args.last_out - args.first_out);
  if (args.end < args.batch * args.height.out) {
    if (index < lines_of_dy) return find(args.dy, args.out_channels, args.first_out, index);
    index -= lines_of_dy;
    if (pointwise(args) && index < count(args.last_in - args.first_in)) {
      return find(args.x, args.in_channels, args.first_in, index);
    }
  }
  return {reinterpret_cast<const char*>(args.dw), 0};
}

// Finds the stretches of the piece that a tap reads in packed x, and returns their number. Stretches that follow each
// other in memory become one.
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

// sums[r] += factor(r) * [low, high]
template <class T, int size, class F>
inline void add_products(Float (&sums)[size][2], Float low, Float high, F factor) {
#pragma GCC unroll 14
  for (int r = 0; r < size; ++r) {
    const Float one = factor(r);
    sums[r][0] = multiply_add<T>(one, low, sums[r][0]);
    sums[r][1] = multiply_add<T>(one, high, sums[r][1]);
  }
}

// dw[r, 0..lanes) += sum over positions of dy[p, r] * x[p, :]; dw has rows `stride` apart.
template <class T, int size>
void outer_products(const Stretch* stretches, int64_t count, const float* dy, float* dw, int64_t stride, int64_t lanes,
                    Soon soon) {
  Float sums[size][2];
#pragma GCC unroll 14
  for (int r = 0; r < size; ++r) {
    sums[r][0] = sums[r][1] = zero();
    _mm_prefetch(dw + r * stride, _MM_HINT_T0);
    _mm_prefetch(dw + r * stride + kPanelIn - 1, _MM_HINT_T0);
  }
  for (int64_t s = 0; s < count; ++s) {
    const Stretch& stretch = stretches[s];
    const float *x = stretch.x, *d = dy + stretch.position * kWidth;
    const char* line = soon.line + stretch.position * soon.pitch;
    int64_t left = stretch.positions;
    for (; left >= kPerWord<T>; left -= kPerWord<T>, x += kPerWord<T> * kPanelIn, d += kPerWord<T> * kWidth) {
      _mm_prefetch(line, _MM_HINT_T1);
      line += kPerWord<T> * soon.pitch;
      add_products<T>(sums, load(x), load(x + kWidth), [&](int r) { return repeat(d + r); });
    }
    if constexpr (kPerWord<T> == 2) {
      if (left == 0) continue;
      add_products<T>(sums, lower_halves(load(x)), lower_halves(load(x + kWidth)),
                      [&](int r) { return lower_halves(repeat(d + r)); });
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

// Calls `outer_products` for a panel of `size` rows, 1 to `most`.
template <class T, int most>
inline void outer_products_of(int64_t size, const Stretch* stretches, int64_t count, const float* dy, float* dw,
                              int64_t stride, int64_t lanes, Soon soon) {
  if constexpr (most > 1) {
    if (size < most) return outer_products_of<T, most - 1>(size, stretches, count, dy, dw, stride, lanes, soon);
  }
  outer_products<T, most>(stretches, count, dy, dw, stride, lanes, soon);
}

// Adds the piece to dw of input channels [channel, channel + lanes), which are one panel at `packed_x`.
template <class T>
void add_panel(const ConvWeightArgs& args, const float* packed_x, int64_t channel, int64_t lanes, int64_t& calls) {
  const int64_t channels = args.last_out - args.first_out, panels = count_panels(channels);
  const int64_t positions = (args.end - args.begin) * args.width.out;
  const int64_t stride = args.height.kernel * args.width.kernel * args.in_channels;
  for (int64_t tap = args.first_tap; tap < args.last_tap; ++tap) {
    const int64_t count = find_stretches(args, packed_x, tap);
    if (count == 0) continue;
    for (int64_t p = 0; p < panels; ++p) {
      const Panel panel(channels, panels, p);
      float* dw = args.dw + (args.first_out + panel.first) * stride + tap * args.in_channels + channel;
      outer_products_of<T, kPanel>(panel.size, args.stretches, count, args.packed_dy + p * positions * kWidth, dw,
                                   stride, lanes, soon<T>(args, calls++));
    }
  }
}

template <class T>
void conv_backward_weight(const ConvWeightArgs& args) {
  pack_dy<T>(args);
  int64_t calls = 0;
  for (int64_t first = args.first_in; first < args.last_in; first += kPackedIn) {
    const int64_t last = args.last_in - first < kPackedIn ? args.last_in : first + kPackedIn;
    pack_x<T>(args, first, last - first);
    const float* packed_x = args.packed_x;
    for (int64_t i = first; i < last; i += kPanelIn, packed_x += panel_pitch(args)) {
      add_panel<T>(args, packed_x, i, last - i < kPanelIn ? last - i : kPanelIn, calls);
    }
  }
}

}  // namespace
