// sum dz and sum dz*(c - mean), dz gathered over the pooling windows.
#include "bn_math.h"
#include "launch.h"
#include "pooling.h"
#include "tile_reduce.h"

namespace fusedres::cuda {

namespace {
constexpr int kBlocksPerMultiprocessor = 2;
template <int V>
constexpr int kValues = 2 * V;
}  // namespace

template <class T, int V, int kKernel, int kStride>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor)
    bn_relu_maxpool_backward_reduce_kernel(BnReluMaxpoolBackwardReduce args, TilePlan plan, void* workspace) {
  FUSEDRES_SHARED(float, shared, kMergeFloats<kValues<V>>);
  const Pooling& pooling = args.pooling;
  const TileThread me(plan);
  const T* c = static_cast<const T*>(args.c) + me.channel;    // [N, H, W, C], from this thread's channels
  const T* dy = static_cast<const T*>(args.dy) + me.channel;  // [N, H', W', C]
  float acc[kValues<V>] = {};
  if (me.active) {
    float mean[V], dz[V];
    load_vector(mean, args.mean, me.channel);
    for (int64_t row = me.row; row < plan.rows; row += plan.row_stride()) {
      const Packet<T, V> in = load_channels<T, V>(c + row * plan.channels, l2_policy(row >= plan.rows - plan.kept));
      gather_dz<T, V, kKernel, kStride>(dz, pooling, position_of(row, pooling.height, pooling.width), dy,
                                        args.indices + me.channel);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        acc[i] += dz[i];
        acc[V + i] = fmaf(dz[i], to_float(in.value[i]) - mean[i], acc[V + i]);
      }
    }
  }
  reduce_tile<V>(acc, shared, workspace, plan, AddMerge(), [&](int64_t channel, auto sum) {
    args.sum_dz[channel] = sum(0);
    args.sum_dz_centered[channel] = sum(1);
    if (args.coefficients.dweight != nullptr) coefficients_of_channel(args.coefficients, channel, sum(0), sum(1));
  });
}

namespace {
TilePlan plan_of(const Pooling& pooling, int vector, const DeviceLimits& limits) {
  return plan_tiles({pooling.batch * pooling.height * pooling.width, pooling.channels, vector, 1,
                     kBlocksPerMultiprocessor, bytes_of(pooling.dtype)},
                    limits);
}
}  // namespace

size_t bn_relu_maxpool_backward_reduce_workspace(const Pooling& pooling) {
  DeviceLimits limits;
  if (current_device_limits(&limits) != cudaSuccess) return 0;
  return std::max(plan_of(pooling, kPacket, limits).workspace_bytes(kValues<kPacket>),
                  plan_of(pooling, 1, limits).workspace_bytes(kValues<1>));
}

cudaError_t bn_relu_maxpool_backward_reduce(const BnReluMaxpoolBackwardReduce& args, Workspace& workspace,
                                            cudaStream_t stream) {
  const Pooling& pooling = args.pooling;
  if (!valid(pooling)) return cudaErrorInvalidValue;
  if (pooling.channels == 0) return cudaSuccess;
  DeviceLimits limits;
  const cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  const bool packets =
      pooling.channels % kPacket == 0 && aligned_to_8(args.indices) && aligned_to_16(args.c, args.dy, args.mean);
  return for_dtype(pooling.dtype, [&](auto type) {
    return for_flag(packets, [&](auto by_packet) {
      return for_window(pooling, [&](auto kernel, auto stride) {
        using T = typename decltype(type)::type;
        constexpr int V = by_packet ? kPacket : 1;
        const TilePlan plan = plan_of(pooling, V, limits);
        const cudaError_t error = prepare_workspace(workspace, plan, kValues<V>, stream);
        if (error != cudaSuccess) return error;
        return launch(bn_relu_maxpool_backward_reduce_kernel<T, V, kernel, stride>,
                      dim3(unsigned(plan.chunks), unsigned(plan.groups)), dim3(unsigned(plan.threads())), stream, args,
                      plan, workspace.data);
      });
    });
  });
}

}  // namespace fusedres::cuda
