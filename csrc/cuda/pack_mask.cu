// The mask of a stored tensor, for kernels whose tiles do not end where bytes of the mask do.
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
    pack_mask_kernel(const T* y, uint8_t* mask, PacketPlan plan) {
  walk<kUnroll<T, kUnroll16>>(
      plan.first(blockIdx.x, int(threadIdx.x)), plan.stride(), plan.packets,
      [&](int64_t step) { return load_flat<false>(y, plan.backwards(step), plan, l2_policy(false)); },
      [&](int64_t step, const Packet<T, kPacket>& in) {
        const int64_t packet = plan.backwards(step);
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < kPacket; ++i) bits |= unsigned(passes(to_float(in.value[i]))) << i;
        mask[packet] = uint8_t(bits & valid_bits(packet, plan));
      });
}

cudaError_t pack_mask(Dtype dtype, int64_t numel, const void* y, uint8_t* mask, cudaStream_t stream) {
  DeviceLimits limits;
  const cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  const PacketPlan plan = plan_packets({numel, 1, kBlocksPerMultiprocessor, bytes_of(dtype), aligned_to_16(y)}, limits);
  return for_half_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(pack_mask_kernel<T>, dim3(unsigned(plan.blocks)), dim3(unsigned(plan.threads)), stream,
                  static_cast<const T*>(y), mask, plan);
  });
}

}  // namespace fusedres::cuda
