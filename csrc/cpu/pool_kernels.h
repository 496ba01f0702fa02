// The stem: BN, ReLU and max-pooling, both ways. Included after vec_avx2.h or vec_avx512.h.
#pragma once

#include "kernels.h"
#include "lanes.h"
#include "select.h"

namespace {

using namespace fusedres::cpu;

constexpr int kNoGradient = 255;

inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// The part [h0, h1) x [w0, w1) of a window that lies inside the image.
struct Inside {
  Inside(const Window& w, int64_t top, int64_t left)
      : h0(at_least(top, 0)),
        h1(at_most(top + w.kernel_size, w.height)),
        w0(at_least(left, 0)),
        w1(at_most(left + w.kernel_size, w.width)) {}
  int64_t h0, h1, w0, w1;
};

// The maximum over positions, channel by channel, and its place. It starts at 0 with place kNoGradient, which is the
// ReLU: only a value above 0, or NaN, replaces the 0.
struct Best {
  void take(Float z, int64_t at) {
    const Keep better = either(greater(z, value), is_nan(z));
    value = select(better, z, value);
    place = select(better, set_int(int(at)), place);
  }
  void take(Float z) { value = select(is_nan(z), z, larger(z, value)); }
  Float value = zero();
  Int place = set_int(kNoGradient);
};

// One output position, all channels. kernel: the window's size if the whole window lies inside the image, else 0.
// Without places only the maximum is rounded, not each candidate: rounding keeps order, so the result is equal.
template <class T, int kernel, bool places>
inline void pool_position(const PoolForwardArgs& args, const T* image, int64_t top, int64_t left, int64_t out) {
  const Window& w = args.window;
  const Inside inside(w, top, left);
  for (int64_t i = 0; i < w.channels; i += kWidth) {
    const int64_t lanes = w.channels - i;
    const Float scale = load(args.scale + i), shift = load(args.shift + i);
    Best best;
    const auto take = [&](Float c, int64_t at) {
      const Float z = fma(scale, c, shift);
      if constexpr (places) {
        best.take(rounded<T>(z), at);
      } else {
        best.take(z);
      }
    };
    if (kernel > 0 && lanes >= kWidth) {
      const T* first = image + (top * w.width + left) * w.channels + i;
#pragma GCC unroll 3
      for (int h = 0; h < kernel; ++h, first += w.width * w.channels) {
#pragma GCC unroll 3
        for (int x = 0; x < kernel; ++x) {
          take(load(first + x * w.channels), h * kernel + x);
        }
      }
    } else {
      for (int64_t h = inside.h0; h < inside.h1; ++h) {
        for (int64_t x = inside.w0; x < inside.w1; ++x) {
          const Float c = load_lanes(image + (h * w.width + x) * w.channels + i, lanes);
          take(c, (h - top) * w.kernel_size + x - left);
        }
      }
    }
    store_lanes(static_cast<T*>(args.y) + out * w.channels + i, places ? best.value : rounded<T>(best.value), lanes);
    if constexpr (places) store_bytes_lanes(args.indices + out * w.channels + i, best.place, lanes);
  }
}

template <class T, bool places>
void pool_rows(const PoolForwardArgs& args, int64_t begin, int64_t end) {
  const Window& w = args.window;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / w.out_height, top = row % w.out_height * w.stride - w.padding;
    const T* image = static_cast<const T*>(args.c) + n * w.height * w.width * w.channels;
    const bool whole = w.kernel_size == 3 && top >= 0 && top + 3 <= w.height;
    for (int64_t ow = 0; ow < w.out_width; ++ow) {
      const int64_t left = ow * w.stride - w.padding, out = row * w.out_width + ow;
      if (whole && left >= 0 && left + 3 <= w.width) {
        pool_position<T, 3, places>(args, image, top, left, out);
      } else {
        pool_position<T, 0, places>(args, image, top, left, out);
      }
    }
  }
}

// Rows [begin, end) of y, of N*out_height.
void bn_relu_maxpool_forward(const PoolForwardArgs& args, int64_t begin, int64_t end) {
  with(args.dtype, [&](auto t) {
    with(args.indices != nullptr,
         [&](auto places) { pool_rows<typename decltype(t)::type, places.value>(args, begin, end); });
  });
}

constexpr int64_t kMostWindows = 15 * 15;  // as many windows can contain one position

// A window that contains a position: the first element of its dy, and the position's place in it.
struct Containing {
  int64_t element;
  int place;
};

// Finds the windows that contain row h, column x of image n, in their order, and returns how many they are.
inline int64_t find_windows(const PoolBackwardArgs& args, int64_t n, int64_t h, int64_t x, Containing* found) {
  const Window& w = args.window;
  const Covering rows = args.rows[h], columns = args.columns[x];
  int64_t count = 0;
  for (int64_t oh = rows.first; oh <= rows.last; ++oh) {
    for (int64_t ow = columns.first; ow <= columns.last; ++ow) {
      const int64_t place = (h - oh * w.stride + w.padding) * w.kernel_size + x - ow * w.stride + w.padding;
      found[count++] = {((n * w.out_height + oh) * w.out_width + ow) * w.channels, int(place)};
    }
  }
  return count;
}

// dz of kWidth channels from `channel` on: the sum of dy over the windows whose maximum lies at this position.
template <class T>
inline Float gather(const T* dy, const uint8_t* indices, const Containing* windows, int64_t count, int64_t channel,
                    int64_t lanes) {
  Float dz = zero();
  for (int64_t k = 0; k < count; ++k) {
    const int64_t at = windows[k].element + channel;
    const Keep here = equal(load_bytes_lanes(indices + at, lanes), set_int(windows[k].place));
    dz = dz + select(here, load_lanes(dy + at, lanes));
  }
  return dz;
}

template <class T, bool sums, bool frozen>
void pool_backward_rows(const PoolBackwardArgs& args, int64_t begin, int64_t end) {
  const Window& w = args.window;
  const int64_t padded = (w.channels + kWidth - 1) / kWidth * kWidth;
  float *sum = args.partial, *centered = args.partial + padded;
  Containing windows[kMostWindows];
  for (int64_t row = begin; row < end; ++row) {
    if constexpr (sums) {
      for (int64_t i = 0; i < 2 * padded; i += kWidth) store(args.partial + i, zero());
    }
    for (int64_t x = 0; x < w.width; ++x) {
      const T* c_at = static_cast<const T*>(args.c) + (row * w.width + x) * w.channels;
      const T* dy = static_cast<const T*>(args.dy);
      const int64_t count = find_windows(args, row / w.height, row % w.height, x, windows);
      const auto channels = [&](int64_t i, int64_t lanes) {
        const Float c = load_lanes(c_at + i, lanes);
        const Float dz = gather(dy, args.indices, windows, count, i, lanes);
        if constexpr (sums) {
          store(sum + i, load(sum + i) + dz);
          store(centered + i, fma(dz, c - load(args.mean + i), load(centered + i)));
        } else {
          const Float a = load(args.main.A + i);
          const Float dc = frozen ? a * dz : fma(a, dz, fma(load(args.main.B + i), c, load(args.main.K + i)));
          store_lanes(static_cast<T*>(args.dc) + (row * w.width + x) * w.channels + i, rounded<T>(dc), lanes);
        }
      };
      int64_t i = 0;
      for (; i + kWidth <= w.channels; i += kWidth) channels(i, kWidth);
      if (i < w.channels) channels(i, w.channels - i);
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
    with(args.main.B == nullptr, [&](auto frozen) { pool_backward_rows<T, false, frozen.value>(args, begin, end); });
  });
}

}  // namespace
