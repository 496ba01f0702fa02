// y = maxpool(relu(scale*c + shift)) and the place of each maximum, in one pass over c.
#include "bn_math.h"
#include "launch.h"
#include "pooling.h"
#include "walk.h"

namespace fusedres::cuda {

namespace {
constexpr int kBlocksPerMultiprocessor = 2;  // as many as the registers allow without spilling
}  // namespace

template <class T, int V, int kKernel, int kStride>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor)
    bn_relu_maxpool_forward_kernel(BnReluMaxpoolForward args, TilePlan plan) {
  constexpr int kColumns = kKernel ? kKernel : 1;  // columns of a window that are loaded at once
  const Pooling& pooling = args.pooling;
  const Window<kKernel, kStride> window(pooling);
  const TileThread me(plan);
  if (!me.active) return;
  float scale[V], shift[V];
  load_vector(scale, args.scale, me.channel);
  load_vector(shift, args.shift, me.channel);
  const T* c = static_cast<const T*>(args.c) + me.channel;  // [N, H, W, C], from this thread's channels
  for (int64_t step = me.row; step < plan.rows; step += plan.row_stride()) {
    const int64_t row = plan.backwards(step);
    const Position out = position_of(row, pooling.pooled_height, pooling.pooled_width);
    float best[V];
    Packet<uint8_t, V> index;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      best[i] = -INFINITY;
      index.value[i] = kNoGradient;
    }
#pragma unroll 1
    for (int place_y = 0; place_y < window.kernel; ++place_y) {
      const int64_t y = out.y * window.stride - window.padding + place_y;
      if (y < 0 || y >= pooling.height) continue;
      for (int place_x = 0; place_x < window.kernel; place_x += kColumns) {
        const int64_t left = out.x * window.stride - window.padding + place_x;
        const T* line = c + ((out.image * pooling.height + y) * pooling.width) * pooling.channels;
        Packet<T, V> staged[kColumns];
#pragma unroll
        for (int k = 0; k < kColumns; ++k)
          if (left + k >= 0 && left + k < pooling.width)
            staged[k] = load_channels<T, V>(line + (left + k) * pooling.channels, l2_policy(true));
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          if (left + k < 0 || left + k >= pooling.width) continue;
#pragma unroll
          for (int i = 0; i < V; ++i) {
            float a = to_float(round_to<T>(affine(to_float(staged[k].value[i]), scale[i], shift[i])));
            a = passes(a) ? a : 0.f;
            if (a > best[i] || isnan(a)) {  // torch's order: the first maximum, and the last NaN
              best[i] = a;
              index.value[i] = uint8_t(place_y * window.kernel + place_x + k);
            }
          }
        }
      }
    }
    Packet<T, V> result;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      result.value[i] = round_to<T>(best[i]);
      if (!passes(best[i])) index.value[i] = kNoGradient;
    }
    const int64_t at = row * plan.channels + me.channel;
    store_channels<T, V>(static_cast<T*>(args.y) + at, result, l2_policy(row < plan.kept));
    store_indices<V>(args.indices + at, index);
  }
}

cudaError_t bn_relu_maxpool_forward(const BnReluMaxpoolForward& args, cudaStream_t stream) {
  const Pooling& pooling = args.pooling;
  if (!valid(pooling)) return cudaErrorInvalidValue;
  const int64_t rows = pooling.batch * pooling.pooled_height * pooling.pooled_width;
  if (rows * pooling.channels == 0) return cudaSuccess;
  DeviceLimits limits;
  const cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  const bool packets = pooling.channels % kPacket == 0 && aligned_to_8(args.indices) &&
                       aligned_to_16(args.c, args.y, args.scale, args.shift);
  return for_dtype(pooling.dtype, [&](auto type) {
    return for_flag(packets, [&](auto by_packet) {
      return for_window(pooling, [&](auto kernel, auto stride) {
        using T = typename decltype(type)::type;
        constexpr int V = by_packet ? kPacket : 1;
        const TilePlan plan =
            plan_tiles({rows, pooling.channels, V, 1, kBlocksPerMultiprocessor, bytes_of(pooling.dtype)}, limits);
        return launch(bn_relu_maxpool_forward_kernel<T, V, kernel, stride>,
                      dim3(unsigned(plan.chunks), unsigned(plan.groups)), dim3(unsigned(plan.threads())), stream, args,
                      plan);
      });
    });
  });
}

}  // namespace fusedres::cuda
