// dz = where(mask, dy, 0), which is the gradient of an identity shortcut.
#include "bn_math.h"
#include "launch.h"
#include "walk.h"

namespace fusedres::cuda {

namespace {
constexpr int kUnroll16 = 2;
constexpr int kBlocksPerMultiprocessor = 4;
}  // namespace

template <class T>
__global__ void __launch_bounds__(kPacketThreads, kBlocksPerMultiprocessor)
    relu_backward_kernel(ReluBackward args, PacketPlan plan) {
  struct Loaded {
    Packet<T, kPacket> dy;
    unsigned bits;
  };
  walk<kUnroll<T, kUnroll16>>(
      plan.first(blockIdx.x, int(threadIdx.x)), plan.stride(), plan.packets,
      [&](int64_t step) {
        const int64_t packet = plan.backwards(step);
        return Loaded{load_flat<false>(static_cast<const T*>(args.dy), packet, plan, l2_policy(false)),
                      args.mask[packet]};
      },
      [&](int64_t step, const Loaded& in) {
        const int64_t packet = plan.backwards(step);
        Packet<T, kPacket> out;
#pragma unroll
        for (int i = 0; i < kPacket; ++i) out.value[i] = in.bits >> i & 1u ? in.dy.value[i] : round_to<T>(0.f);
        store_flat<false>(static_cast<T*>(args.dz), packet, out, plan, l2_policy(packet < plan.kept));
      });
}

cudaError_t relu_backward(const ReluBackward& args, cudaStream_t stream) {
  if (args.numel == 0) return cudaSuccess;
  DeviceLimits limits;
  const cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  const PacketPlan plan = plan_packets(
      {args.numel, 1, kBlocksPerMultiprocessor, bytes_of(args.dtype), aligned_to_16(args.dy, args.dz)}, limits);
  return for_dtype(args.dtype, [&](auto type) {
    return launch(relu_backward_kernel<typename decltype(type)::type>, dim3(unsigned(plan.blocks)),
                  dim3(unsigned(plan.threads)), stream, args, plan);
  });
}

}  // namespace fusedres::cuda
