// The stem: BN, ReLU and max-pooling, both ways. Included after vec_avx2.h or vec_avx512.h.
#pragma once

#include "kernels.h"
#include "select.h"

namespace {

using namespace fusedres::cpu;

constexpr int kNoGradient = 255;

// The first `lanes` of a vector: the channels that are left at the end of a position.
template <class T>
inline Float load_lanes(const T* p, int64_t lanes) {
  if (lanes >= kWidth) return load(p);
  T lane[kWidth] = {};
  for (int64_t i = 0; i < lanes; ++i) lane[i] = p[i];
  return load(lane);
}

template <class T>
inline void store_lanes(T* p, Float v, int64_t lanes) {
  if (lanes >= kWidth) return store(p, v);
  T lane[kWidth];
  store(lane, v);
  for (int64_t i = 0; i < lanes; ++i) p[i] = lane[i];
}

inline Int load_bytes_lanes(const uint8_t* p, int64_t lanes) {
  if (lanes >= kWidth) return load_bytes(p);
  uint8_t lane[kWidth] = {};
  for (int64_t i = 0; i < lanes; ++i) lane[i] = p[i];
  return load_bytes(lane);
}

inline void store_bytes_lanes(uint8_t* p, Int v, int64_t lanes) {
  if (lanes >= kWidth) return store_bytes(p, v);
  uint8_t lane[kWidth];
  store_bytes(lane, v);
  for (int64_t i = 0; i < lanes; ++i) p[i] = lane[i];
}

inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// One output position, all channels. Starting from 0 and place 255 makes the ReLU and "no gradient" come for free:
// only what is greater than 0, or NaN, replaces them.
template <class T>
inline void pool_position(const PoolForwardArgs& args, const T* image, int64_t top, int64_t left, int64_t out) {
  const Window& w = args.window;
  const int64_t h0 = at_least(top, 0), h1 = at_most(top + w.kernel_size, w.height);
  const int64_t w0 = at_least(left, 0), w1 = at_most(left + w.kernel_size, w.width);
  for (int64_t i = 0; i < w.channels; i += kWidth) {
    const int64_t lanes = w.channels - i;
    const Float scale = load(args.scale + i), shift = load(args.shift + i);
    Float best = zero();
    Int place = set_int(kNoGradient);
    for (int64_t h = h0; h < h1; ++h) {
      for (int64_t x = w0; x < w1; ++x) {
        const Float c = load_lanes(image + (h * w.width + x) * w.channels + i, lanes);
        const Float z = rounded<T>(fma(scale, c, shift));
        const Keep better = either(greater(z, best), is_nan(z));
        best = select(better, z, best);
        place = select(better, set_int(static_cast<int>((h - top) * w.kernel_size + x - left)), place);
      }
    }
    store_lanes(static_cast<T*>(args.y) + out * w.channels + i, best, lanes);
    store_bytes_lanes(args.indices + out * w.channels + i, place, lanes);
  }
}

// Rows [begin, end) of y, of N*out_height.
void bn_relu_maxpool_forward(const PoolForwardArgs& args, int64_t begin, int64_t end) {
  const Window& w = args.window;
  with(args.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / w.out_height, oh = row % w.out_height;
      const T* image = static_cast<const T*>(args.c) + n * w.height * w.width * w.channels;
      for (int64_t ow = 0; ow < w.out_width; ++ow) {
        pool_position(args, image, oh * w.stride - w.padding, ow * w.stride - w.padding, row * w.out_width + ow);
      }
    }
  });
}

// dz of kWidth channels at row h, column x of image n: dy of the windows whose maximum lies there.
template <class T>
inline Float gather(const PoolBackwardArgs& args, int64_t n, int64_t h, int64_t x, Covering rows, Covering columns,
                    int64_t i) {
  const Window& w = args.window;
  const int64_t lanes = w.channels - i;
  Float dz = zero();
  for (int64_t oh = rows.first; oh <= rows.last; ++oh) {
    for (int64_t ow = columns.first; ow <= columns.last; ++ow) {
      const int64_t at = ((n * w.out_height + oh) * w.out_width + ow) * w.channels + i;
      const int64_t place = (h - oh * w.stride + w.padding) * w.kernel_size + x - ow * w.stride + w.padding;
      const Keep here = equal(load_bytes_lanes(args.indices + at, lanes), set_int(static_cast<int>(place)));
      dz = dz + select(here, load_lanes(static_cast<const T*>(args.dy) + at, lanes));
    }
  }
  return dz;
}

template <class T, bool sums, bool frozen>
void pool_backward_rows(const PoolBackwardArgs& args, int64_t begin, int64_t end) {
  const Window& w = args.window;
  const int64_t padded = (w.channels + kWidth - 1) / kWidth * kWidth;
  float *sum = args.partial, *centered = args.partial + padded;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / w.height, h = row % w.height;
    const Covering rows = args.rows[h];
    if constexpr (sums) {
      for (int64_t i = 0; i < 2 * padded; i += kWidth) store(args.partial + i, zero());
    }
    for (int64_t x = 0; x < w.width; ++x) {
      const int64_t at = (row * w.width + x) * w.channels;
      const Covering columns = args.columns[x];
      for (int64_t i = 0; i < w.channels; i += kWidth) {
        const Float c = load_lanes(static_cast<const T*>(args.c) + at + i, w.channels - i);
        const Float dz = gather<T>(args, n, h, x, rows, columns, i);
        if constexpr (sums) {
          store(sum + i, load(sum + i) + dz);
          store(centered + i, fma(dz, c - load(args.mean + i), load(centered + i)));
        } else {
          const Float a = load(args.main.a + i);
          const Float dc = frozen ? a * dz : fma(a, dz, fma(load(args.main.b + i), c, load(args.main.k + i)));
          store_lanes(static_cast<T*>(args.dc) + at + i, rounded<T>(dc), w.channels - i);
        }
      }
    }
    if constexpr (sums) {
      for (int64_t i = 0; i < 2 * padded; i += kWidth) add_to_double(args.sums + i, load(args.partial + i));
    }
  }
}

// Rows [begin, end) of c, of N*height.
void bn_relu_maxpool_backward(const PoolBackwardArgs& args, int64_t begin, int64_t end) {
  with(args.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (args.dc == nullptr) return pool_backward_rows<T, true, false>(args, begin, end);
    with(args.main.b == nullptr,
         [&](auto frozen) { pool_backward_rows<T, false, frozen.value>(args, begin, end); });
  });
}

}  // namespace
