// Windows of a max pooling: where a row lies in the image, and the gradient that the row gets from its windows.
#pragma once

#include "launchers.h"
#include "packet.h"

namespace fusedres::cuda {

constexpr int kNoGradient = 255;  // index of a window whose maximum is not positive

struct Position {
  int64_t image, y, x;
};

// Takes row (image*height + y)*width + x apart. Rows past 2^32 are rare, and 64-bit division is slow.
__device__ __forceinline__ Position position_of(int64_t row, int64_t height, int64_t width) {
  if ((row >> 32) == 0 && (width >> 32) == 0 && (height >> 32) == 0) {
    const uint32_t line = uint32_t(row) / uint32_t(width), image = line / uint32_t(height);
    return {int64_t(image), int64_t(line - image * uint32_t(height)), int64_t(uint32_t(row) - line * uint32_t(width))};
  }
  const int64_t line = row / width, image = line / height;
  return {image, line - image * height, row - line * width};
}

// kKernel, kStride: known at compile time (the stem's 3 and 2), so that windows unroll; 0: any.
template <int kKernel, int kStride>
struct Window {
  int kernel, stride, padding;

  __device__ __forceinline__ explicit Window(const Pooling& pooling)
      : kernel(kKernel ? kKernel : pooling.kernel_size),
        stride(kStride ? kStride : pooling.stride),
        padding(pooling.padding) {}
};

// dz of V channels at one position of c: the sum of dy over the windows whose index points at the position.
// dy, indices [N, H', W', C], from the first of the V channels on
template <class T, int V, int kKernel, int kStride>
__device__ __forceinline__ void gather_dz(float (&dz)[V], const Pooling& pooling, const Position& at, const T* dy,
                                          const uint8_t* indices) {
  [[maybe_unused]] constexpr int kUnrolled = kKernel ? (kKernel + kStride - 1) / (kStride + !kStride) : 1;
  const Window<kKernel, kStride> window(pooling);
  const int64_t pooled_height = pooling.pooled_height, pooled_width = pooling.pooled_width;
  const int reach = (window.kernel + window.stride - 1) / window.stride;  // windows over one position along each axis
  const int64_t bottom = (at.y + window.padding) / window.stride, right = (at.x + window.padding) / window.stride;
#pragma unroll
  for (int i = 0; i < V; ++i) dz[i] = 0.f;
#pragma unroll kUnrolled
  for (int j = 0; j < reach; ++j) {
    const int64_t out_y = bottom - j;
    const int in_window_y = int(at.y + window.padding - out_y * window.stride);
    if (out_y < 0 || out_y >= pooled_height || in_window_y >= window.kernel) continue;
#pragma unroll kUnrolled
    for (int k = 0; k < reach; ++k) {
      const int64_t out_x = right - k;
      const int in_window_x = int(at.x + window.padding - out_x * window.stride);
      if (out_x < 0 || out_x >= pooled_width || in_window_x >= window.kernel) continue;
      const int64_t offset = ((at.image * pooled_height + out_y) * pooled_width + out_x) * pooling.channels;
      const int place = in_window_y * window.kernel + in_window_x;
      const Packet<T, V> gradient = load_channels<T, V>(dy + offset, l2_policy(true));
      const Packet<uint8_t, V> index = load_indices<V>(indices + offset);
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (index.value[i] == place) dz[i] += to_float(gradient.value[i]);
    }
  }
}

}  // namespace fusedres::cuda
