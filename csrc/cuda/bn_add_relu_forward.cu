// y = relu(scale*c + shift + r) and its mask. The kernel walks the tensor backwards: the statistics pass, or the
// convolution, has just left the end of c in L2, and the next pass starts where this pass ends.
#include "bn_math.h"
#include "launch.h"
#include "walk.h"

namespace fusedres::cuda {

namespace {
constexpr int kUnroll16 = 2;
}  // namespace

enum class Residual { kNone, kPlain, kAffine };

// as many as the registers of each kernel allow without spilling
constexpr int blocks_per_multiprocessor(Residual residual) { return residual == Residual::kAffine ? 3 : 4; }
template <Residual kResidual>
constexpr int kBlocksPerMultiprocessor = blocks_per_multiprocessor(kResidual);

template <class T, bool kFixed, Residual kResidual>
__global__ void __launch_bounds__(kPacketThreads, kBlocksPerMultiprocessor<kResidual>)
    bn_add_relu_forward_kernel(BnAddReluForward args, PacketPlan plan) {
  const T* c = static_cast<const T*>(args.c);                // [P*C]
  const T* residual = static_cast<const T*>(args.residual);  // [P*C]
  T* y = static_cast<T*>(args.y);                            // [P*C]
  float scale[kPacket], shift[kPacket], residual_scale[kPacket], residual_shift[kPacket];
  const auto load_vectors = [&](int64_t packet) {
    load_vector_flat<kFixed>(scale, args.scale, packet, plan);
    load_vector_flat<kFixed>(shift, args.shift, packet, plan);
    if constexpr (kResidual == Residual::kAffine) {
      load_vector_flat<kFixed>(residual_scale, args.residual_scale, packet, plan);
      load_vector_flat<kFixed>(residual_shift, args.residual_shift, packet, plan);
    }
  };
  struct Loaded {
    Packet<T, kPacket> c, residual;
  };
  const int64_t first = plan.first(blockIdx.x, int(threadIdx.x));
  if (kFixed && first < plan.packets) load_vectors(plan.backwards(first));
  // the vectors of a packet that wraps around the channels are gathered, which takes the registers of a second packet
  constexpr int kAhead = kFixed || kResidual != Residual::kAffine ? kUnroll<T, kUnroll16> : 1;
  walk<kAhead>(
      first, plan.stride(), plan.packets,
      [&](int64_t step) {
        Loaded in;
        in.c = load_flat<kFixed>(c, plan.backwards(step), plan, l2_policy(false));
        if constexpr (kResidual != Residual::kNone)
          in.residual = load_flat<kFixed>(residual, plan.backwards(step), plan, l2_policy(false));
        return in;
      },
      [&](int64_t step, const Loaded& in) {
        const int64_t packet = plan.backwards(step);
        if (!kFixed) load_vectors(packet);
        Packet<T, kPacket> out;
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < kPacket; ++i) {
          float z = affine(to_float(in.c.value[i]), scale[i], shift[i]);
          if constexpr (kResidual == Residual::kPlain) z += to_float(in.residual.value[i]);
          if constexpr (kResidual == Residual::kAffine)
            z += affine(to_float(in.residual.value[i]), residual_scale[i], residual_shift[i]);
          out.value[i] = round_to<T>(z);
          const bool positive = passes(to_float(out.value[i]));
          bits |= unsigned(positive) << i;
          if (args.relu && !positive) out.value[i] = round_to<T>(0.f);
        }
        store_flat<kFixed>(y, packet, out, plan, l2_policy(packet < plan.kept));
        if (args.mask != nullptr) args.mask[packet] = uint8_t(bits & valid_bits(packet, plan));
      });
}

namespace {

template <class T, bool kFixed>
cudaError_t launch_forward(const BnAddReluForward& args, const PacketPlan& plan, Residual residual,
                           cudaStream_t stream) {
  const auto start = [&](auto kernel) {
    return launch(kernel, dim3(unsigned(plan.blocks)), dim3(unsigned(plan.threads)), stream, args, plan);
  };
  switch (residual) {
    case Residual::kNone: return start(bn_add_relu_forward_kernel<T, kFixed, Residual::kNone>);
    case Residual::kPlain: return start(bn_add_relu_forward_kernel<T, kFixed, Residual::kPlain>);
    default: return start(bn_add_relu_forward_kernel<T, kFixed, Residual::kAffine>);
  }
}

}  // namespace

cudaError_t bn_add_relu_forward(const BnAddReluForward& args, cudaStream_t stream) {
  const Shape& shape = args.shape;
  const int64_t numel = shape.rows * shape.channels;
  if (numel == 0) return cudaSuccess;
  DeviceLimits limits;
  const cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  const bool aligned =
      aligned_to_16(args.c, args.residual, args.y, args.scale, args.shift, args.residual_scale, args.residual_shift);
  const Residual residual = args.residual == nullptr         ? Residual::kNone
                            : args.residual_scale == nullptr ? Residual::kPlain
                                                             : Residual::kAffine;
  const PacketPlan plan = plan_packets(
      {numel, shape.channels, blocks_per_multiprocessor(residual), bytes_of(shape.dtype), aligned}, limits);
  return for_dtype(shape.dtype, [&](auto type) {
    return for_flag(plan.fixed_channels, [&](auto fixed) {
      return launch_forward<typename decltype(type)::type, fixed>(args, plan, residual, stream);
    });
  });
}

}  // namespace fusedres::cuda
