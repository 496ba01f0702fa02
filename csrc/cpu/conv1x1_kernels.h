// 1x1 convolutions as matrix products: the forward in inference, with BN, addition and ReLU; the input gradient, added
// to the gradient that reaches x by the shortcut. Sums are float. Included after vec_avx2.h or vec_avx512.h.
#pragma once

#include "kernels.h"
#include "select.h"
#include "words.h"

namespace {

using namespace fusedres::cpu;

constexpr int64_t kRowsAhead = 16;  // rows of W to prefetch: each lies in a page of its own
constexpr int64_t kRowsAtOnce = kRowsOfProduct / kPanel * kPanel;
constexpr int64_t kDepthAhead = 16;      // rows of a panel to prefetch: a deep panel lies in the second cache
constexpr int64_t kPanelsThatFetch = 2;  // of a tile: so that few fetches are under way at a time

// result[row(p), n] = sum over k of a[source(p), k] * b[k, n], in words.
struct Product {
  const float* a;         // [sources, depth]
  const float* packed_b;  // [panel][depth][kPanelIn]
  int64_t depth, columns;
  int64_t step;  // words between most positions' rows of a
  RowsOfProduct rows;
};

// Some rows of a times a panel of b, over some of the depth.
struct ProductTile {
  const float* a;             // [rows][pitch], copied
  const float* b;             // [depth, kPanelIn]
  const int64_t* rows;        // the row of the result for each row of a
  const float* next;          // [rows][Product::step]: what will be copied next to these rows, fetched by ...
  int64_t fetchers, fetcher;  // ... so many panels, of which this is number `fetcher`, if it is one of them
  int64_t depth, column, lanes;
  bool first, last;  // whether this is the first and the last part of the depth
};

// Finishes the input gradient: adds the sums to the shortcut's gradient and writes dx.
template <class T>
struct AddToShortcut {
  explicit AddToShortcut(const Conv1x1InputArgs& args)
      : shortcut_dy(static_cast<const T*>(args.shortcut_dy)), mask(args.mask), dx(static_cast<T*>(args.dx)) {}

  const T* soon() const { return shortcut_dy == nullptr ? dx : shortcut_dy; }
  void operator()(const ProductTile& tile, int64_t element, int64_t, Float sum, int64_t lanes) const {
    store_lanes(dx + element, rounded<T>(sum + before(tile, element, lanes)), lanes);
  }

 private:
  Float before(const ProductTile& tile, int64_t element, int64_t lanes) const {
    if (!tile.first) return load_lanes(dx + element, lanes);
    if (shortcut_dy == nullptr) return zero();
    const Float v = load_lanes(shortcut_dy + element, lanes);
    return mask == nullptr ? v : select(unpack_bits_lanes(mask + element / 8, lanes), v);
  }

  const T* shortcut_dy;
  const uint8_t* mask;
  T* dx;
};

// Finishes the forward: y, once the sum is whole.
template <class T, Residual form, bool with_relu>
struct ScaleShiftAddRelu {
  explicit ScaleShiftAddRelu(const Conv1x1Args& args)
      : args(args), residual(static_cast<const T*>(args.residual)), y(static_cast<T*>(args.y)) {}

  const T* soon() const { return form == Residual::kNone ? y : residual; }
  void operator()(const ProductTile& tile, int64_t element, int64_t channel, Float sum, int64_t lanes) const {
    if (!tile.first) sum = sum + load_lanes(y + element, lanes);
    if (!tile.last) return store_lanes(y + element, rounded<T>(sum), lanes);
    Float z = fma(load_lanes(args.scale + channel, lanes), sum, load_lanes(args.shift + channel, lanes));
    if constexpr (form == Residual::kIdentity) z = z + load_lanes(residual + element, lanes);
    if constexpr (form == Residual::kProjection) {
      const Float scale = load_lanes(args.residual_scale + channel, lanes);
      z = z + fma(scale, load_lanes(residual + element, lanes), load_lanes(args.residual_shift + channel, lanes));
    }
    z = rounded<T>(z);
    store_lanes(y + element, with_relu ? relu(z) : z, lanes);
  }

 private:
  const Conv1x1Args& args;
  const T* residual;
  T* y;
};

// Finishes a tile with fewer columns than a panel, from [size][kPanelIn] sums.
template <class Finish>
__attribute__((noinline)) void finish_some(const Product& product, const ProductTile& tile, const float* sums,
                                           int64_t size, const Finish& finish) {
  for (int64_t r = 0; r < size; ++r) {
    for (int64_t i = 0; i < tile.lanes; i += kWidth) {
      const int64_t column = tile.column + i;
      finish(tile, tile.rows[r] * product.columns + column, column, load(sums + r * kPanelIn + i), tile.lanes - i);
    }
  }
}

// fetch: prefetches lines of `next`. The hardware does not foresee short rows.
// Not inlined: with what surrounds it some of AVX2's sixteen registers would be in memory, at half the speed.
template <class T, int size, bool fetch, class Finish>
__attribute__((noinline)) void multiply(const Product& product, const ProductTile& tile, const Finish& finish) {
  Float sums[size][2];
  const T* soon = finish.soon() + tile.column;
#pragma GCC unroll 14
  for (int r = 0; r < size; ++r) {
    sums[r][0] = sums[r][1] = zero();
    _mm_prefetch(soon + tile.rows[r] * product.columns, _MM_HINT_T0);
    _mm_prefetch(soon + tile.rows[r] * product.columns + tile.lanes - 1, _MM_HINT_T0);
  }
  const int64_t pitch = product.rows.pitch;
  const float *a = tile.a, *b = tile.b;
  for (int64_t k = 0; k < tile.depth; ++k, ++a, b += kPanelIn) {
    if constexpr (fetch) {
      if (k % tile.fetchers == tile.fetcher) {
        _mm_prefetch(tile.next + k % kLine<float> * product.step + k / kLine<float> * kLine<float>, _MM_HINT_T0);
      }
    }
    for (int64_t i = 0; i < kPanelIn; i += kLine<float>) _mm_prefetch(b + kDepthAhead * kPanelIn + i, _MM_HINT_T0);
    const Float low = load(b), high = load(b + kWidth);
#pragma GCC unroll 14
    for (int r = 0; r < size; ++r) {
      const Float one = repeat(a + r * pitch);
      sums[r][0] = multiply_add<T>(one, low, sums[r][0]);
      sums[r][1] = multiply_add<T>(one, high, sums[r][1]);
    }
  }
  if (tile.lanes < kPanelIn) {
    float rest[size][kPanelIn];
#pragma GCC unroll 14
    for (int r = 0; r < size; ++r) {
      store(rest[r], sums[r][0]);
      store(rest[r] + kWidth, sums[r][1]);
    }
    return finish_some(product, tile, rest[0], size, finish);
  }
#pragma GCC unroll 14
  for (int r = 0; r < size; ++r) {  // unrolled, or `sums` would live in memory
    const int64_t element = tile.rows[r] * product.columns + tile.column;
    finish(tile, element, tile.column, sums[r][0], kWidth);
    finish(tile, element + kWidth, tile.column + kWidth, sums[r][1], kWidth);
  }
}

inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// The next smaller size of a tile. The largest is kPanel; smaller ones take the rows that are left.
constexpr int smaller(int size) { return size > 8 ? 8 : size > 4 ? 4 : size / 2; }

// Multiplies by the largest tile of at most `most` and at most `left` rows, and returns its number of rows.
template <class T, int most, class Finish>
inline int64_t multiply_some(int64_t left, const Product& product, const ProductTile& tile, const Finish& finish) {
  if constexpr (most > 1) {
    if (left < most) return multiply_some<T, smaller(most)>(left, product, tile, finish);
  }
  if (tile.fetcher < tile.fetchers) {
    multiply<T, most, true>(product, tile, finish);
  } else {
    multiply<T, most, false>(product, tile, finish);
  }
  return most;
}

// Multiplies positions [begin, end). All columns of a few tiles' rows are finished before the next: the result and the
// operands added to it then pass in sequence.
template <class T, class Source, class Row, class Finish>
inline void multiply_rows(const Product& product, int64_t begin, int64_t end, Source source, Row row,
                          const Finish& finish) {
  const int64_t panels = (product.columns + kPanelIn - 1) / kPanelIn;
  const int64_t fetchers = panels < kPanelsThatFetch ? 1 : kPanelsThatFetch;
  int64_t rows[kRowsOfProduct];
  for (int64_t first = begin; first < end; first += kRowsAtOnce) {
    const int64_t last = smaller_of(end, first + kRowsAtOnce);
    for (int64_t position = first; position < last; ++position) rows[position - first] = row(position);
    int64_t depth = 0;
    for (int64_t done = 0; done < product.depth; done += depth) {
      depth = smaller_of(product.depth - done, product.rows.depth);
      for (int64_t position = first; position < last; ++position) {
        __builtin_memcpy(product.rows.copied + (position - first) * product.rows.pitch,
                         product.a + source(position) * product.depth + done, depth * sizeof(float));
      }
      const bool whole = done + depth == product.depth;
      const float* next = product.a + source(whole ? last : first) * product.depth + (whole ? 0 : done + depth);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t column = panel * kPanelIn;
        const float* b = product.packed_b + column * product.depth + done * kPanelIn;
        for (int64_t i = 0; i < last - first;) {
          const ProductTile tile{product.rows.copied + i * product.rows.pitch,
                                 b,
                                 rows + i,
                                 next + i * product.step,
                                 fetchers,
                                 panel,
                                 depth,
                                 column,
                                 smaller_of(product.columns - column, kPanelIn),
                                 done == 0,
                                 whole};
          i += multiply_some<T, kPanel>(last - first - i, product, tile, finish);
        }
      }
    }
  }
}

// Packs W [out_channels, in_channels] as [panel][out_channels][kPanelIn], panels [begin, end). A word of bfloat16 holds
// two output channels. Columns beyond the last channel are 0.
template <class T>
void pack_weight(const PackArgs& args, int64_t begin, int64_t end) {
  const int64_t step = kPerWord<T> * args.in_channels, depth = args.out_channels / kPerWord<T>;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t channel = panel * kPanelIn, left = args.in_channels - channel;
    float* packed = args.packed + channel * depth;
    const T* weight = static_cast<const T*>(args.weight) + channel;
    for (int64_t o = 0; o < depth; ++o, weight += step, packed += kPanelIn) {
      for (int64_t i = 0; i < kPanelIn; i += kLine<T>) _mm_prefetch(weight + kRowsAhead * step + i, _MM_HINT_T0);
      store_words(packed, weight, args.in_channels, left);
    }
  }
}

// Transposes four rows of four words, `pitch` apart, to four rows of a panel, kPanelIn apart.
inline void transpose(const float* weight, int64_t pitch, float* packed) {
  __m128 a = _mm_loadu_ps(weight), b = _mm_loadu_ps(weight + pitch);
  __m128 c = _mm_loadu_ps(weight + 2 * pitch), d = _mm_loadu_ps(weight + 3 * pitch);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(packed, a);
  _mm_storeu_ps(packed + kPanelIn, b);
  _mm_storeu_ps(packed + 2 * kPanelIn, c);
  _mm_storeu_ps(packed + 3 * kPanelIn, d);
}

// Packs W [out_channels, in_channels] as [panel][in_channels][kPanelIn], with panels of output channels.
template <class T>
void pack_weight_transposed(const PackArgs& args, int64_t begin, int64_t end) {
  const int64_t depth = args.in_channels / kPerWord<T>;
  for (int64_t panel = begin; panel < end; ++panel) {
    float* packed = args.packed + panel * kPanelIn * depth;
    for (int64_t lane = 0; lane < kPanelIn; lane += 4) {
      const int64_t out = panel * kPanelIn + lane;
      const float* weight = static_cast<const float*>(args.weight) + out * depth;
      int64_t i = 0;
      if (out + 4 <= args.out_channels) {
        for (; i + 4 <= depth; i += 4) transpose(weight + i, depth, packed + i * kPanelIn + lane);
      }
      for (; i < depth; ++i) {
        for (int64_t l = 0; l < 4; ++l) {
          packed[i * kPanelIn + lane + l] = out + l < args.out_channels ? word(weight + l * depth + i) : 0;
        }
      }
    }
  }
}

// The row of a convolution's input for a position of its output, one of N*height.out*width.out.
inline int64_t input_row(const ConvAxis& height, const ConvAxis& width, int64_t position) {
  if (height.stride == 1 && width.stride == 1) return position;
  const int64_t line = position / width.out, image = line / height.out;
  const int64_t input_line = image * height.in + line % height.out * height.stride;
  return input_line * width.in + position % width.out * width.stride;
}

// Writes dx of positions [begin, end) of dy.
template <class T>
void conv1x1_backward_input(const Conv1x1InputArgs& args, int64_t begin, int64_t end) {
  const int64_t depth = args.out_channels / kPerWord<T>;
  const auto same = [](int64_t at) { return at; };
  const auto input = [&](int64_t at) { return input_row(args.height, args.width, at); };
  const Product product{
      static_cast<const float*>(args.dy), args.packed_weight, depth, args.in_channels, depth, args.rows_of_product};
  multiply_rows<T>(product, begin, end, same, input, AddToShortcut<T>(args));
}

// Writes y of positions [begin, end).
template <class T>
void conv1x1_forward(const Conv1x1Args& args, int64_t begin, int64_t end) {
  const int64_t depth = args.in_channels / kPerWord<T>;
  const auto same = [](int64_t at) { return at; };
  const auto input = [&](int64_t at) { return input_row(args.height, args.width, at); };
  const Product product{static_cast<const float*>(args.x), args.packed_weight,  depth, args.out_channels,
                        depth * args.width.stride,         args.rows_of_product};
  with(args.form, [&](auto form) {
    with(args.relu, [&](auto relu) {
      const ScaleShiftAddRelu<T, form.value, relu.value> finish(args);
      multiply_rows<T>(product, begin, end, input, same, finish);
    });
  });
}

}  // namespace
