// Grouped 3x3 convolutions. A vector has the results of neighbouring channels: of several groups, whose inputs a
// permutation brings to the lanes, or of a part of one, whose inputs are repeated. Included after vec_avx2.h or
// vec_avx512.h.
#pragma once

#include "conv1x1_kernels.h"
#include "kernels.h"
#include "select.h"

namespace {

using namespace fusedres::cpu;

constexpr int64_t kTaps = 3;
constexpr int kPositions = 7;  // of a block of results: the sides of ResNet's images are multiples
constexpr int kInputsAtOnce = kWidth == 16 ? 4 : 2;  // of a weight gradient: with more its sums would leave registers

// What the lanes of vector `v` read of a position: input j of each lane's group.
template <bool within>  // whether groups lie within a vector
struct Inputs {
  Inputs(const GroupedArgs& args, int64_t v)
      : places(args.places), first(within ? v * kWidth : v * kWidth / args.in_group * args.in_group) {}

  Float operator()(const float* position, int64_t j) const {
    if constexpr (within) return permuted(load(position + first), places + j * kWidth);
    return repeat(position + first + j);
  }

  const int32_t* places;
  int64_t first;
};

// Row `row` of N*height.out as an input line for tap `tap`, or null beyond the image.
inline const float* input_line(const GroupedArgs& args, int64_t row, int64_t tap) {
  const int64_t image = row / args.height.out, line = row % args.height.out * args.height.stride + tap - 1;
  if (line < 0 || line >= args.height.in) return nullptr;
  return args.x + (image * args.height.in + line) * args.width.in * args.channels;
}

// Results [first, first + size) of a row, for the channels of one vector.
template <int size, int stride, bool edge, class In>
inline void forward_block(const GroupedForwardArgs& args, const In& in, int64_t v, int64_t row, int64_t first) {
  const int64_t step = args.in_group * kWidth;  // between taps
  const float* taps = args.packed + v * kTaps * kTaps * step;
  Float sums[size];
#pragma GCC unroll 7
  for (int p = 0; p < size; ++p) sums[p] = zero();
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    const float* line = input_line(args, row, tap);
    if (line == nullptr) continue;
    const int64_t column = first * stride - 1;
    for (int64_t j = 0; j < args.in_group; ++j) {
      const float* weight = taps + tap * kTaps * step + j * kWidth;
      const Float weights[kTaps] = {load(weight), load(weight + step), load(weight + 2 * step)};
#pragma GCC unroll 15
      for (int c = 0; c < (size - 1) * stride + kTaps; ++c) {
        if (edge && uint64_t(column + c) >= uint64_t(args.width.in)) continue;
        const Float value = in(line + (column + c) * args.channels, j);
#pragma GCC unroll 3
        for (int k = 0; k < kTaps; ++k) {
          if (c < k || (c - k) % stride != 0 || (c - k) / stride >= size) continue;
          sums[(c - k) / stride] = fma(value, weights[k], sums[(c - k) / stride]);
        }
      }
    }
  }
  float* y = args.y + (row * args.width.out + first) * args.channels + v * kWidth;
#pragma GCC unroll 7
  for (int p = 0; p < size; ++p) {
    Float z = sums[p];
    if (args.scale != nullptr) z = fma(load(args.scale + v * kWidth), z, load(args.shift + v * kWidth));
    store(y + p * args.channels, args.relu ? relu(z) : z);
  }
}

// The largest block of at most `most` and at most `left` results; returns its size.
template <int most, int stride, class In>
inline int64_t forward_some(const GroupedForwardArgs& args, const In& in, int64_t v, int64_t row, int64_t first) {
  if constexpr (most > 1) {
    if (args.width.out - first < most) return forward_some<most == 7 ? 4 : most / 2, stride>(args, in, v, row, first);
  }
  const bool edge = first == 0 || (first + most - 1) * stride + 1 >= args.width.in;
  edge ? forward_block<most, stride, true>(args, in, v, row, first)
       : forward_block<most, stride, false>(args, in, v, row, first);
  return most;
}

template <bool within, int stride>
void grouped_forward(const GroupedForwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t rows = begin; rows < end; rows += args.rows_at_once) {
    for (int64_t v = 0; v < args.channels / kWidth; ++v) {
      const Inputs<within> in(args, v);
      for (int64_t row = rows; row < smaller_of(end, rows + args.rows_at_once); ++row) {
        for (int64_t first = 0; first < args.width.out;)
          first += forward_some<kPositions, stride>(args, in, v, row, first);
      }
    }
  }
}

void grouped_forward(const GroupedForwardArgs& args, int64_t begin, int64_t end) {
  with(args.places != nullptr, [&](auto within) {
    with(args.width.stride == 2,
         [&](auto halves) { grouped_forward<within.value, halves.value ? 2 : 1>(args, begin, end); });
  });
}

// Sums of dy times kInputsAtOnce inputs, from input j of each group on, for the taps of one row.
struct RowSums {
  Float sums[kTaps][kInputsAtOnce];

  void add(Float dy, int tap, const Float (&values)[kInputsAtOnce]) {
#pragma GCC unroll 4
    for (int i = 0; i < kInputsAtOnce; ++i) sums[tap][i] = fma(dy, values[i], sums[tap][i]);
  }
};

template <class In>
inline void read(const In& in, const float* position, int64_t j, Float (&values)[kInputsAtOnce]) {
#pragma GCC unroll 4
  for (int i = 0; i < kInputsAtOnce; ++i) values[i] = in(position, j + i);
}

// Adds position p, of which inputs may lie beyond the image.
template <class In>
inline void add_at_edge(const GroupedArgs& args, const In& in, const float* line, const float* dy, int64_t p, int64_t j,
                        RowSums& sums) {
  for (int tap = 0; tap < kTaps; ++tap) {
    const int64_t column = p * args.width.stride + tap - 1;
    if (column < 0 || column >= args.width.in) continue;
    Float values[kInputsAtOnce];
    read(in, line + column * args.channels, j, values);
    if (tap == 0) sums.add(load(dy + p * args.channels), 0, values);
    if (tap == 1) sums.add(load(dy + p * args.channels), 1, values);
    if (tap == 2) sums.add(load(dy + p * args.channels), 2, values);
  }
}

// Adds the positions of a row.
template <int stride, class In>
inline void add_row(const GroupedArgs& args, const In& in, const float* line, const float* dy, int64_t j,
                    RowSums& sums) {
  const int64_t channels = args.channels;
  const int64_t inner =
      smaller_of(args.width.out, (args.width.in - 2) / stride + 1);  // beyond the last whose taps are inside
  add_at_edge(args, in, line, dy, 0, j, sums);
  int64_t p = 1;
  if (stride == 1 && p < inner) {
    Float columns[kTaps][kInputsAtOnce];  // of the taps of position p, in turn
    read(in, line, j, columns[0]);
    read(in, line + channels, j, columns[1]);
    for (; p + kTaps <= inner; p += kTaps) {
#pragma GCC unroll 3
      for (int i = 0; i < kTaps; ++i) {
        read(in, line + (p + i + 1) * channels, j, columns[(i + 2) % kTaps]);
        const Float one = load(dy + (p + i) * channels);
#pragma GCC unroll 3
        for (int tap = 0; tap < kTaps; ++tap) sums.add(one, tap, columns[(i + tap) % kTaps]);
      }
    }
  }
  for (; p < inner; ++p) {
    const Float one = load(dy + p * channels);
#pragma GCC unroll 3
    for (int tap = 0; tap < kTaps; ++tap) {
      Float values[kInputsAtOnce];
      read(in, line + (p * stride + tap - 1) * channels, j, values);
      sums.add(one, tap, values);
    }
  }
  for (; p < args.width.out; ++p) add_at_edge(args, in, line, dy, p, j, sums);
}

// dw of the channels of vectors [begin, end). Rows are summed a few at a time: shorter sums have smaller errors.
template <bool within, int stride>
void grouped_backward_weight(const GroupedWeightArgs& args, int64_t begin, int64_t end) {
  const int64_t rows = args.batch * args.height.out, tap_sums = args.in_group * kWidth;
  for (int64_t v = begin; v < end; ++v) {
    const Inputs<within> in(args, v);
    for (int64_t i = 0; i < kTaps * kTaps * tap_sums; i += kWidth) store(args.sums + i, zero());
    for (int64_t first = 0; first < rows; first += args.rows_at_once) {
      for (int64_t down = 0; down < kTaps; ++down) {
        for (int64_t j = 0; j < args.in_group; j += kInputsAtOnce) {
          RowSums sums;
#pragma GCC unroll 3
          for (int tap = 0; tap < kTaps; ++tap) {
#pragma GCC unroll 4
            for (int i = 0; i < kInputsAtOnce; ++i) sums.sums[tap][i] = zero();
          }
          for (int64_t row = first; row < smaller_of(rows, first + args.rows_at_once); ++row) {
            const float* line = input_line(args, row, down);
            if (line == nullptr) continue;
            add_row<stride>(args, in, line, args.dy + row * args.width.out * args.channels + v * kWidth, j, sums);
          }
#pragma GCC unroll 3
          for (int tap = 0; tap < kTaps; ++tap) {
            float* total = args.sums + (down * kTaps + tap) * tap_sums + j * kWidth;
#pragma GCC unroll 4
            for (int i = 0; i < kInputsAtOnce; ++i) {
              store(total + i * kWidth, load(total + i * kWidth) + sums.sums[tap][i]);
            }
          }
        }
      }
    }
    float* dw = args.dw + v * kWidth * kTaps * kTaps * args.in_group;
    for (int64_t lane = 0; lane < kWidth; ++lane) {
      for (int64_t i = 0; i < kTaps * kTaps * args.in_group; ++i) *dw++ = args.sums[i * kWidth + lane];
    }
  }
}

void grouped_backward_weight(const GroupedWeightArgs& args, int64_t begin, int64_t end) {
  with(args.places != nullptr, [&](auto within) {
    with(args.width.stride == 2,
         [&](auto halves) { grouped_backward_weight<within.value, halves.value ? 2 : 1>(args, begin, end); });
  });
}

}  // namespace
