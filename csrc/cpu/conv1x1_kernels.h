// 1x1 convolutions as matrix products: the forward, in inference with BN, addition and ReLU; the input gradient, added
// to the gradient that reaches x by the shortcut. Sums are float. Included after vec_avx2.h or vec_avx512.h.
#pragma once

#include "conv1x1_finish.h"
#include "select.h"

namespace {

using namespace fusedres::cpu;

constexpr int64_t kRowsAtOnce = kRowsOfProduct / kPanel * kPanel;
constexpr int64_t kDepthAhead = 16;      // rows of a panel to prefetch: a deep panel lies in the second cache
constexpr int64_t kPanelsThatFetch = 2;  // at most, half of a row each: so that few fetches are under way at a time

// result[row(p), n] = sum over k of a[source(p), k] * b[k, n], in words.
struct Product {
  const float* a;         // [sources, depth]
  const float* packed_b;  // [panel][depth][kPanelIn]
  int64_t depth, columns;
  int64_t step;  // words between most positions' rows of a
  RowsOfProduct rows;
};

// Lines that are fetched while a tile multiplies, of the rows that are copied next to its own: those of sixteen rows in
// turn. The hardware does not foresee short rows.
struct Ahead {
  const float* rows;
  int64_t step, line;  // words between rows and between lines; 0: nothing is fetched
  int64_t slower;      // 1: half as many

  FUSEDRES_INLINE void fetch(int64_t k) const {
    k >>= slower;
    _mm_prefetch(rows + k % kLine<float> * step + k / kLine<float> * line, _MM_HINT_T0);
  }
};

// Some rows of a times a panel of b, over some of the depth.
struct ProductTile {
  const float* a;       // [rows][pitch], copied
  const float* b;       // [depth, kPanelIn]
  const int64_t* rows;  // the row of the result for each row of a
  Ahead ahead;
  int64_t depth, column, lanes;
  Part part;
};

// Finishes a tile with fewer columns than a panel, from [size][kPanelIn] sums.
template <class Finish>
__attribute__((noinline)) void finish_some(const Product& product, const ProductTile& tile, const float* sums,
                                           int64_t size, const Finish& finish) {
  for (int64_t r = 0; r < size; ++r) {
    for (int64_t i = 0; i < tile.lanes; i += kWidth) {
      const int64_t column = tile.column + i;
      finish(tile.part, tile.rows[r] * product.columns + column, column, load(sums + r * kPanelIn + i), tile.lanes - i);
    }
  }
}

// What the end of a tile reads. The lines are fetched one by one while the tile multiplies: many at once would keep the
// panel waiting.
template <class T>
struct Operands {
  const T* tensor;  // [rows, columns], from the tile's first column on, or null
  const int64_t* rows;
  int64_t columns, size;  // size: how many rows the tile has

  static constexpr int64_t kLinesOfRow = kPanelIn / kLine<T>;
  int64_t lines() const { return tensor == nullptr ? 0 : size * kLinesOfRow; }
  FUSEDRES_INLINE void fetch(int64_t index) const {
    if (index >= lines()) return;
    _mm_prefetch(tensor + rows[index / kLinesOfRow] * columns + index % kLinesOfRow * kLine<T>, _MM_HINT_T0);
  }
};

inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Not inlined: with what surrounds it some of AVX2's sixteen registers would be in memory, at half the speed.
template <class T, int size, class Finish>
__attribute__((noinline)) void multiply(const Product& product, const ProductTile& tile, const Finish& finish) {
  Float sums[size][2];
  const T* soon = finish.soon();
  const Operands<T> operands{soon == nullptr ? nullptr : soon + tile.column, tile.rows, product.columns, size};
#pragma GCC unroll 14
  for (int r = 0; r < size; ++r) sums[r][0] = sums[r][1] = zero();
  const int64_t pitch = product.rows.pitch;
  const float *a = tile.a, *b = tile.b;
  const auto add = [&]() __attribute__((always_inline)) {
    for (int64_t i = 0; i < kPanelIn; i += kLine<float>) _mm_prefetch(b + kDepthAhead * kPanelIn + i, _MM_HINT_T0);
    const Float low = load(b), high = load(b + kWidth);
#pragma GCC unroll 14
    for (int r = 0; r < size; ++r) {
      const Float one = repeat(a + r * pitch);
      sums[r][0] = multiply_add<T>(one, low, sums[r][0]);
      sums[r][1] = multiply_add<T>(one, high, sums[r][1]);
    }
    ++a;
    b += kPanelIn;
  };
  const int64_t fetching = smaller_of(tile.depth, tile.ahead.line != 0 ? tile.depth : operands.lines());
  for (int64_t k = 0; k < fetching; ++k) {
    tile.ahead.fetch(k);
    operands.fetch(k);
    add();
  }
  for (int64_t k = fetching; k < tile.depth; ++k) add();
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
    finish(tile.part, element, tile.column, sums[r][0], kWidth);
    finish(tile.part, element + kWidth, tile.column + kWidth, sums[r][1], kWidth);
  }
}

// The next smaller size of a tile. The largest is kPanel; smaller ones take the rows that are left.
constexpr int smaller(int size) { return size > 8 ? 8 : size > 4 ? 4 : size / 2; }

// Multiplies by the largest tile of at most `most` and at most `left` rows, and returns its number of rows.
template <class T, int most, class Finish>
inline int64_t multiply_some(int64_t left, const Product& product, const ProductTile& tile, const Finish& finish) {
  if constexpr (most > 1) {
    if (left < most) return multiply_some<T, smaller(most)>(left, product, tile, finish);
  }
  multiply<T, most>(product, tile, finish);
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
      const auto ahead = [&](const float* rows, int64_t panel) {
        if (panel >= fetchers) return Ahead{product.packed_b, 0, 0, 0};
        return Ahead{rows + panel * (depth / 2), product.step, kLine<float>, fetchers - 1};
      };
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t column = panel * kPanelIn;
        const float* b = product.packed_b + column * product.depth + done * kPanelIn;
        for (int64_t i = 0; i < last - first;) {
          const ProductTile tile{product.rows.copied + i * product.rows.pitch,
                                 b,
                                 rows + i,
                                 ahead(next + i * product.step, panel),
                                 depth,
                                 column,
                                 smaller_of(product.columns - column, kPanelIn),
                                 {done == 0, whole}};
          i += multiply_some<T, kPanel>(last - first - i, product, tile, finish);
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
  with(args.past_caches, [&](auto past_caches) {
    const AddToShortcut<T, past_caches.value> finish{static_cast<T*>(args.dx), static_cast<const T*>(args.shortcut_dy),
                                                     args.mask};
    multiply_rows<T>(product, begin, end, same, input, finish);
    if (past_caches.value) fence_past_caches();
  });
}

// Writes y of positions [begin, end).
template <class T>
void conv1x1_forward(const Conv1x1Args& args, int64_t begin, int64_t end) {
  const int64_t depth = args.in_channels / kPerWord<T>;
  const auto same = [](int64_t at) { return at; };
  const auto input = [&](int64_t at) { return input_row(args.height, args.width, at); };
  const Product product{static_cast<const float*>(args.x), args.packed_weight,  depth, args.out_channels,
                        depth * args.width.stride,         args.rows_of_product};
  const auto run = [&](const auto& finish) { multiply_rows<T>(product, begin, end, input, same, finish); };
  with(args.past_caches, [&](auto past_caches) {
    if (args.scale == nullptr) {
      run(AddToShortcut<T, past_caches.value>{static_cast<T*>(args.y)});
    } else {
      with(args.form, [&](auto form) {
        with(args.relu, [&](auto relu) { run(ScaleShiftAddRelu<T, form.value, relu.value, past_caches.value>(args)); });
      });
    }
    if (past_caches.value) fence_past_caches();
  });
}

}  // namespace
