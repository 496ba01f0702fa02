// 1x1 convolutions as matrix products in float: forward in inference, with BN, addition and ReLU; the input gradient,
// added to the gradient that reaches x by another way. Included after conv_kernels.h, whose tiles it has.
#pragma once

#include "kernels.h"
#include "select.h"

namespace {

using namespace fusedres::cpu;

constexpr int64_t kDepth = 512;     // of the product, summed at once: a tile's rows stay in the first cache
constexpr int64_t kRowsAhead = 16;  // rows of W, each in a page of its own

// A product's operands: result[p, n] = sum over k of a[p, k] * b[k, n].
struct Product {
  const float* a;          // [positions, depth]
  const float* packed_b;   // [panel][depth][kPanelIn]
  int64_t depth, columns;
};

// Some rows of a and a panel of b, over some of the depth.
struct ProductTile {
  const float* a;       // of the first row
  const float* b;       // [depth, kPanelIn]
  const int64_t* rows;  // of the result, one for each of a
  int64_t depth, column, lanes;
  bool first, last;     // of the depth
};

inline float one_lane(Float v) {
  float lanes[kWidth];
  store(lanes, v);
  return lanes[0];
}

// The input gradient's results: dx, and what is added to it.
struct AddToShortcut {
  const ConvInputArgs& args;

  const float* soon() const { return args.shortcut_dy == nullptr ? args.dx : args.shortcut_dy; }
  void operator()(const ProductTile& tile, int64_t element, int64_t, Float sum) const {
    store(args.dx + element, sum + added(tile, element));
  }
  void one(const ProductTile& tile, int64_t element, int64_t, float sum) const {
    float v = 0;
    if (!tile.first) {
      v = args.dx[element];
    } else if (args.shortcut_dy != nullptr) {
      const bool kept = args.mask == nullptr || (args.mask[element / 8] >> (element % 8) & 1);
      v = kept ? args.shortcut_dy[element] : 0;
    }
    args.dx[element] = sum + v;
  }

 private:
  Float added(const ProductTile& tile, int64_t element) const {
    if (!tile.first) return load(args.dx + element);
    if (args.shortcut_dy == nullptr) return zero();
    const Float v = load(args.shortcut_dy + element);
    return args.mask == nullptr ? v : select(unpack_bits(args.mask + element / 8), v);
  }
};

// The forward's results: y, of the sum once it is whole.
template <Residual form, bool with_relu>
struct ScaleShiftAddRelu {
  const Conv1x1Args& args;

  const float* soon() const { return form == Residual::none ? args.y : args.residual; }
  void operator()(const ProductTile& tile, int64_t element, int64_t channel, Float sum) const {
    if (!tile.first) sum = sum + load(args.y + element);
    if (!tile.last) return store(args.y + element, sum);
    Float z = fma(load(args.scale + channel), sum, load(args.shift + channel));
    if constexpr (form == Residual::identity) z = z + load(args.residual + element);
    if constexpr (form == Residual::projection) {
      const Float scale = load(args.residual_scale + channel), shift = load(args.residual_shift + channel);
      z = z + fma(scale, load(args.residual + element), shift);
    }
    store(args.y + element, with_relu ? relu(z) : z);
  }
  void one(const ProductTile& tile, int64_t element, int64_t channel, float sum) const {
    if (!tile.first) sum = sum + args.y[element];
    if (!tile.last) {
      args.y[element] = sum;
      return;
    }
    Float z = fma(repeat(args.scale + channel), repeat(&sum), repeat(args.shift + channel));
    if constexpr (form == Residual::identity) z = z + repeat(args.residual + element);
    if constexpr (form == Residual::projection) {
      const Float scale = repeat(args.residual_scale + channel), shift = repeat(args.residual_shift + channel);
      z = z + fma(scale, repeat(args.residual + element), shift);
    }
    args.y[element] = one_lane(with_relu ? relu(z) : z);
  }
};

// fetch: asks for the rows of a that follow the tile's, which the hardware does not foresee where they are short.
template <int size, bool fetch, class Finish>
void multiply(const Product& product, const ProductTile& tile, const Finish& finish) {
  Float sums[size][2];
  const float* soon = finish.soon() + tile.column;
#pragma GCC unroll 14
  for (int r = 0; r < size; ++r) {
    sums[r][0] = sums[r][1] = zero();
    _mm_prefetch(soon + tile.rows[r] * product.columns, _MM_HINT_T0);
    _mm_prefetch(soon + tile.rows[r] * product.columns + tile.lanes - 1, _MM_HINT_T0);
  }
  const int64_t pitch = product.depth;
  const float *a = tile.a, *b = tile.b, *next = a + size * pitch;
  for (int64_t k = 0; k < tile.depth; ++k, ++a, b += kPanelIn) {
    if constexpr (fetch) _mm_prefetch(next + k * size, _MM_HINT_T0);
    const Float low = load(b), high = load(b + kWidth);
#pragma GCC unroll 14
    for (int r = 0; r < size; ++r) {
      const Float one = repeat(a + r * pitch);
      sums[r][0] = fma(one, low, sums[r][0]);
      sums[r][1] = fma(one, high, sums[r][1]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < size; ++r) {  // unrolled, or `sums` would live in memory
    const int64_t element = tile.rows[r] * product.columns + tile.column;
    if (tile.lanes == kPanelIn) {
      finish(tile, element, tile.column, sums[r][0]);
      finish(tile, element + kWidth, tile.column + kWidth, sums[r][1]);
      continue;
    }
    float row[kPanelIn];
    store(row, sums[r][0]);
    store(row + kWidth, sums[r][1]);
    for (int64_t i = 0; i < tile.lanes; ++i) finish.one(tile, element + i, tile.column + i, row[i]);
  }
}

// `multiply` of a tile's size, 1 to `most`.
template <int most, class Finish>
inline void multiply_of(int64_t size, const Product& product, const ProductTile& tile, const Finish& finish) {
  if constexpr (most > 1) {
    if (size < most) return multiply_of<most - 1>(size, product, tile, finish);
  }
  if (tile.column == 0 && tile.depth == product.depth) return multiply<most, true>(product, tile, finish);
  multiply<most, false>(product, tile, finish);
}

// Positions [begin, end) of a; row(position) is the result's. One tile's rows of the result are finished before the
// next: what is written to and added from memory is read in sequence then, which counts for more than that W is read
// again for every tile.
template <class Row, class Finish>
inline void multiply_rows(const Product& product, int64_t begin, int64_t end, Row row, const Finish& finish) {
  const int64_t tiles = count_panels(end - begin), panels = (product.columns + kPanelIn - 1) / kPanelIn;
  for (int64_t t = 0; t < tiles; ++t) {
    const Panel some(end - begin, tiles, t);
    const int64_t position = begin + some.first;
    int64_t rows[kPanel];
    for (int64_t i = 0; i < some.size; ++i) rows[i] = row(position + i);
    for (int64_t done = 0; done < product.depth; done += kDepth) {
      const int64_t depth = product.depth - done < kDepth ? product.depth - done : kDepth;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t column = panel * kPanelIn, left = product.columns - column;
        const float* a = product.a + position * product.depth + done;
        const float* b = product.packed_b + column * product.depth + done * kPanelIn;
        const ProductTile tile{a, b, rows, depth, column, left < kPanelIn ? left : kPanelIn, done == 0,
                               done + depth == product.depth};
        multiply_of<kPanel>(some.size, product, tile, finish);
      }
    }
  }
}

// W [out_channels, in_channels] as [panel][out_channels][kPanelIn], panels [begin, end); zeros beyond the last channel
void pack_weight(const PackArgs& args, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t channel = panel * kPanelIn, left = args.in_channels - channel;
    float* packed = args.packed + channel * args.out_channels;
    const float* weight = args.weight + channel;
    for (int64_t o = 0; o < args.out_channels; ++o, weight += args.in_channels, packed += kPanelIn) {
      for (int64_t i = 0; i < kPanelIn; i += kLine) {
        _mm_prefetch(weight + kRowsAhead * args.in_channels + i, _MM_HINT_T0);
      }
      pack_position(weight, left < kPanelIn ? left : kPanelIn, 0, packed);
    }
  }
}

// Four rows of W, `pitch` apart, over four input channels, as four rows of kPanelIn.
inline void transpose(const float* weight, int64_t pitch, float* packed) {
  __m128 a = _mm_loadu_ps(weight), b = _mm_loadu_ps(weight + pitch);
  __m128 c = _mm_loadu_ps(weight + 2 * pitch), d = _mm_loadu_ps(weight + 3 * pitch);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(packed, a);
  _mm_storeu_ps(packed + kPanelIn, b);
  _mm_storeu_ps(packed + 2 * kPanelIn, c);
  _mm_storeu_ps(packed + 3 * kPanelIn, d);
}

// The same W as [panel][in_channels][kPanelIn], panels of output channels
void pack_weight_transposed(const PackArgs& args, int64_t begin, int64_t end) {
  const int64_t depth = args.in_channels;
  for (int64_t panel = begin; panel < end; ++panel) {
    float* packed = args.packed + panel * kPanelIn * depth;
    for (int64_t lane = 0; lane < kPanelIn; lane += 4) {
      const int64_t out = panel * kPanelIn + lane;
      const float* weight = args.weight + out * depth;
      int64_t i = 0;
      if (out + 4 <= args.out_channels) {
        for (; i + 4 <= depth; i += 4) transpose(weight + i, depth, packed + i * kPanelIn + lane);
      }
      for (; i < depth; ++i) {
        for (int64_t l = 0; l < 4; ++l) {
          packed[i * kPanelIn + lane + l] = out + l < args.out_channels ? weight[l * depth + i] : 0;
        }
      }
    }
  }
}

// The row of dx that a position of dy, of N*height.out*width.out, belongs to.
inline int64_t row_of(const ConvInputArgs& args, int64_t position) {
  const ConvAxis &height = args.height, &width = args.width;
  if (height.stride == 1 && width.stride == 1) return position;
  const int64_t line = position / width.out, image = line / height.out;
  const int64_t x_line = image * height.in + line % height.out * height.stride;
  return x_line * width.in + position % width.out * width.stride;
}

// dx of positions [begin, end) of dy
void conv_backward_input(const ConvInputArgs& args, int64_t begin, int64_t end) {
  const Product product{args.dy, args.packed_weight, args.out_channels, args.in_channels};
  multiply_rows(product, begin, end, [&](int64_t at) { return row_of(args, at); }, AddToShortcut{args});
}

// y of positions [begin, end)
void conv1x1_forward(const Conv1x1Args& args, int64_t begin, int64_t end) {
  const Product product{args.x, args.packed_weight, args.in_channels, args.out_channels};
  with(args.form, [&](auto form) {
    with(args.relu, [&](auto relu) {
      const ScaleShiftAddRelu<form.value, relu.value> finish{args};
      multiply_rows(product, begin, end, [](int64_t at) { return at; }, finish);
    });
  });
}

}  // namespace
