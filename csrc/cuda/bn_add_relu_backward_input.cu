// dc = A*dz + B*c + K and the gradient of the shortcut. The kernel walks the tensors backwards: the reduction has just
// left their ends in L2.
#include "bn_math.h"
#include "launch.h"
#include "walk.h"

namespace fusedres::cuda {

namespace {
constexpr int kUnroll16 = 2;
}  // namespace

enum class Shortcut { kNone, kIdentity, kProjection };

// as many as the registers of each kernel allow without spilling
constexpr int blocks_per_multiprocessor(Shortcut shortcut) { return shortcut == Shortcut::kNone ? 3 : 2; }
template <bool kFixed, Shortcut kShortcut>
constexpr int kBlocksPerMultiprocessor =
    kFixed || kShortcut != Shortcut::kProjection ? blocks_per_multiprocessor(kShortcut) : 1;

// A, B, K of the 8 elements of a packet
template <bool kFixed>
struct CoefficientVectors {
  float A[kPacket], B[kPacket], K[kPacket];

  __device__ __forceinline__ void load(const Coefficients& from, int64_t packet, const PacketPlan& plan) {
    load_vector_flat<kFixed>(A, from.A, packet, plan);
    load_vector_flat<kFixed>(B, from.B, packet, plan);
    load_vector_flat<kFixed>(K, from.K, packet, plan);
  }
};

template <class T, bool kFixed, Gate kGate, Shortcut kShortcut>
__global__ void __launch_bounds__(kPacketThreads, (kBlocksPerMultiprocessor<kFixed, kShortcut>))
    bn_add_relu_backward_input_kernel(BnAddReluBackwardInput args, PacketPlan plan) {
  const T* dy = static_cast<const T*>(args.dy);                  // [P*C]
  const T* c = static_cast<const T*>(args.c);                    // [P*C]
  const T* shortcut_c = static_cast<const T*>(args.shortcut_c);  // [P*C]
  T* dc = static_cast<T*>(args.dc);                              // [P*C]
  T* dresidual = static_cast<T*>(args.dresidual);                // [P*C]
  const bool training = args.grads.B != nullptr, shortcut_training = args.shortcut_grads.B != nullptr;
  float scale[kPacket], shift[kPacket];
  CoefficientVectors<kFixed> grads, shortcut_grads;
  const auto load_vectors = [&](int64_t packet) {
    grads.load(args.grads, packet, plan);
    if constexpr (kShortcut == Shortcut::kProjection) shortcut_grads.load(args.shortcut_grads, packet, plan);
    if constexpr (kGate == Gate::kSign) {
      load_vector_flat<kFixed>(scale, args.scale, packet, plan);
      load_vector_flat<kFixed>(shift, args.shift, packet, plan);
    }
  };
  struct Loaded {
    Packet<T, kPacket> dy, c, shortcut_c;
    unsigned bits;
  };
  const int64_t first = plan.first(blockIdx.x, int(threadIdx.x));
  if (kFixed && first < plan.packets) load_vectors(plan.backwards(first));
  // the vectors of a packet that wraps around the channels are gathered, which takes the registers of a second packet
  walk<kFixed ? kUnroll<T, kUnroll16> : 1>(
      first, plan.stride(), plan.packets,
      [&](int64_t step) {
        const int64_t packet = plan.backwards(step);
        Loaded in;
        in.dy = load_flat<kFixed>(dy, packet, plan, l2_policy(false));
        in.c = load_flat<kFixed>(c, packet, plan, l2_policy(false));
        if constexpr (kShortcut == Shortcut::kProjection)
          in.shortcut_c = load_flat<kFixed>(shortcut_c, packet, plan, l2_policy(false));
        if constexpr (kGate == Gate::kBits) in.bits = args.mask == nullptr ? 0xffu : args.mask[packet];
        return in;
      },
      [&](int64_t step, const Loaded& in) {
        const int64_t packet = plan.backwards(step);
        if (!kFixed) load_vectors(packet);
        Packet<T, kPacket> out, residual;
#pragma unroll
        for (int i = 0; i < kPacket; ++i) {
          const float value = to_float(in.c.value[i]);
          const bool pass = kGate == Gate::kBits ? (in.bits >> i & 1u) != 0
                                                 : passes(to_float(round_to<T>(affine(value, scale[i], shift[i]))));
          const float dz = pass ? to_float(in.dy.value[i]) : 0.f;
          out.value[i] = round_to<T>(apply_coefficients(dz, value, grads.A[i], grads.B[i], grads.K[i], training));
          if constexpr (kShortcut == Shortcut::kIdentity) residual.value[i] = pass ? in.dy.value[i] : round_to<T>(0.f);
          if constexpr (kShortcut == Shortcut::kProjection)
            residual.value[i] =
                round_to<T>(apply_coefficients(dz, to_float(in.shortcut_c.value[i]), shortcut_grads.A[i],
                                               shortcut_grads.B[i], shortcut_grads.K[i], shortcut_training));
        }
        const uint64_t policy = l2_policy(packet < plan.kept);
        store_flat<kFixed>(dc, packet, out, plan, policy);
        if constexpr (kShortcut != Shortcut::kNone) store_flat<kFixed>(dresidual, packet, residual, plan, policy);
      });
}

namespace {

template <class T, bool kFixed, Gate kGate>
cudaError_t launch_input(const BnAddReluBackwardInput& args, const PacketPlan& plan, Shortcut shortcut,
                         cudaStream_t stream) {
  const auto start = [&](auto kernel) {
    return launch(kernel, dim3(unsigned(plan.blocks)), dim3(unsigned(plan.threads)), stream, args, plan);
  };
  switch (shortcut) {
    case Shortcut::kNone: return start(bn_add_relu_backward_input_kernel<T, kFixed, kGate, Shortcut::kNone>);
    case Shortcut::kIdentity: return start(bn_add_relu_backward_input_kernel<T, kFixed, kGate, Shortcut::kIdentity>);
    default: return start(bn_add_relu_backward_input_kernel<T, kFixed, kGate, Shortcut::kProjection>);
  }
}

}  // namespace

cudaError_t bn_add_relu_backward_input(const BnAddReluBackwardInput& args, cudaStream_t stream) {
  const Shape& shape = args.shape;
  const int64_t numel = shape.rows * shape.channels;
  if (numel == 0) return cudaSuccess;
  DeviceLimits limits;
  const cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  const Coefficients &main = args.grads, &side = args.shortcut_grads;
  const bool aligned = aligned_to_16(args.dy, args.c, args.shortcut_c, args.dc, args.dresidual, args.scale, args.shift,
                                     main.A, main.B, main.K, side.A, side.B, side.K);
  const Shortcut shortcut = args.shortcut_c != nullptr  ? Shortcut::kProjection
                            : args.dresidual != nullptr ? Shortcut::kIdentity
                                                        : Shortcut::kNone;
  const int outputs = shortcut == Shortcut::kNone ? 1 : 2;
  const PacketPlan plan = plan_packets(
      {numel, shape.channels, blocks_per_multiprocessor(shortcut), bytes_of(shape.dtype) * outputs, aligned}, limits);
  return for_dtype(shape.dtype, [&](auto type) {
    return for_flag(plan.fixed_channels, [&](auto fixed) {
      using T = typename decltype(type)::type;
      if (args.mask == nullptr && args.relu) return launch_input<T, fixed, Gate::kSign>(args, plan, shortcut, stream);
      return launch_input<T, fixed, Gate::kBits>(args, plan, shortcut, stream);
    });
  });
}

}  // namespace fusedres::cuda
