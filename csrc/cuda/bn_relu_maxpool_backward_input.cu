// dc = A*dz + B*c + K, dz gathered over the pooling windows.
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
    bn_relu_maxpool_backward_input_kernel(BnReluMaxpoolBackwardInput args, TilePlan plan) {
  const Pooling& pooling = args.pooling;
  const TileThread me(plan);
  if (!me.active) return;
  const bool training = args.grads.B != nullptr;
  float A[V], B[V], K[V], dz[V];
  load_vector(A, args.grads.A, me.channel);
  load_vector(B, args.grads.B, me.channel);
  load_vector(K, args.grads.K, me.channel);
  const T* c = static_cast<const T*>(args.c) + me.channel;    // [N, H, W, C], from this thread's channels
  const T* dy = static_cast<const T*>(args.dy) + me.channel;  // [N, H', W', C]
  T* dc = static_cast<T*>(args.dc) + me.channel;              // [N, H, W, C]
  for (int64_t step = me.row; step < plan.rows; step += plan.row_stride()) {
    const int64_t row = plan.backwards(step);
    const Packet<T, V> in = load_channels<T, V>(c + row * plan.channels, l2_policy(false));
    gather_dz<T, V, kKernel, kStride>(dz, pooling, position_of(row, pooling.height, pooling.width), dy,
                                      args.indices + me.channel);
    Packet<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i)
      out.value[i] = round_to<T>(apply_coefficients(dz[i], to_float(in.value[i]), A[i], B[i], K[i], training));
    store_channels<T, V>(dc + row * plan.channels, out, l2_policy(row < plan.kept));
  }
}

cudaError_t bn_relu_maxpool_backward_input(const BnReluMaxpoolBackwardInput& args, cudaStream_t stream) {
  const Pooling& pooling = args.pooling;
  if (!valid(pooling)) return cudaErrorInvalidValue;
  const int64_t rows = pooling.batch * pooling.height * pooling.width;
  if (rows * pooling.channels == 0) return cudaSuccess;
  DeviceLimits limits;
  const cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  const bool packets = pooling.channels % kPacket == 0 && aligned_to_8(args.indices) &&
                       aligned_to_16(args.c, args.dy, args.dc, args.grads.A, args.grads.B, args.grads.K);
  return for_dtype(pooling.dtype, [&](auto type) {
    return for_flag(packets, [&](auto by_packet) {
      return for_window(pooling, [&](auto kernel, auto stride) {
        using T = typename decltype(type)::type;
        constexpr int V = by_packet ? kPacket : 1;
        const TilePlan plan =
            plan_tiles({rows, pooling.channels, V, 1, kBlocksPerMultiprocessor, bytes_of(pooling.dtype)}, limits);
        return launch(bn_relu_maxpool_backward_input_kernel<T, V, kernel, stride>,
                      dim3(unsigned(plan.chunks), unsigned(plan.groups)), dim3(unsigned(plan.threads())), stream, args,
                      plan);
      });
    });
  });
}

}  // namespace fusedres::cuda
