// sum dz, sum dz*(c - mean), and sum dz*(shortcut_c - shortcut_mean) for a projection.
#include "bn_math.h"
#include "launch.h"
#include "tile_reduce.h"

namespace fusedres::cuda {

namespace {
constexpr int kUnroll16 = 2;
template <int V, bool kProjection>
constexpr int kValues = (kProjection ? 3 : 2) * V;
// as many as the registers of each kernel allow without spilling
constexpr int blocks_per_multiprocessor(bool projection) { return projection ? 1 : 2; }
template <bool kProjection>
constexpr int kBlocksPerMultiprocessor = blocks_per_multiprocessor(kProjection);
}  // namespace

template <class T, int V, Gate kGate, bool kProjection>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor<kProjection>)
    bn_add_relu_backward_reduce_kernel(BnAddReluBackwardReduce args, TilePlan plan, void* workspace) {
  FUSEDRES_SHARED(float, shared, (kMergeFloats<kValues<V, kProjection>>));
  const TileThread me(plan);
  const T* dy = static_cast<const T*>(args.dy);                  // [P, C]
  const T* c = static_cast<const T*>(args.c);                    // [P, C]
  const T* shortcut_c = static_cast<const T*>(args.shortcut_c);  // [P, C]
  struct Loaded {
    Packet<T, V> dy, c, shortcut_c;
    unsigned bits;
  };
  float acc[kValues<V, kProjection>] = {};
  if (me.active) {
    float mean[V], scale[V], shift[V], shortcut_mean[V];
    load_vector(mean, args.mean, me.channel);
    if constexpr (kGate == Gate::kSign) {
      load_vector(scale, args.scale, me.channel);
      load_vector(shift, args.shift, me.channel);
    }
    if constexpr (kProjection) load_vector(shortcut_mean, args.shortcut_mean, me.channel);
    walk<kUnroll<T, kUnroll16>>(
        me.row, plan.row_stride(), plan.rows,
        [&](int64_t row) {
          const int64_t at = row * plan.channels + me.channel;
          const uint64_t policy = l2_policy(row >= plan.rows - plan.kept);
          Loaded in;
          in.dy = load_channels<T, V>(dy + at, policy);
          in.c = load_channels<T, V>(c + at, policy);
          if constexpr (kProjection) in.shortcut_c = load_channels<T, V>(shortcut_c + at, policy);
          if constexpr (kGate == Gate::kBits)
            in.bits = args.mask == nullptr ? 0xffu : unsigned(args.mask[at / 8]) >> (at % 8);
          return in;
        },
        [&](int64_t, const Loaded& in) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const float value = to_float(in.c.value[i]);
            const bool pass = kGate == Gate::kBits ? (in.bits >> i & 1u) != 0
                                                   : passes(to_float(round_to<T>(affine(value, scale[i], shift[i]))));
            const float dz = pass ? to_float(in.dy.value[i]) : 0.f;
            acc[i] += dz;
            acc[V + i] = fmaf(dz, value - mean[i], acc[V + i]);
            if constexpr (kProjection)
              acc[2 * V + i] = fmaf(dz, to_float(in.shortcut_c.value[i]) - shortcut_mean[i], acc[2 * V + i]);
          }
        });
  }
  reduce_tile<V>(acc, shared, workspace, plan, AddMerge(), [&](int64_t channel, auto sum) {
    args.sum_dz[channel] = sum(0);
    args.sum_dz_centered[channel] = sum(1);
    if (args.coefficients.dweight != nullptr) coefficients_of_channel(args.coefficients, channel, sum(0), sum(1));
    if constexpr (kProjection) {
      args.shortcut_sum[channel] = sum(2);
      if (args.shortcut_coefficients.dweight != nullptr)
        coefficients_of_channel(args.shortcut_coefficients, channel, sum(0), sum(2));
    }
  });
}

namespace {

TilePlan plan_of(const Shape& shape, int vector, bool projection, const DeviceLimits& limits) {
  return plan_tiles({shape.rows, shape.channels, vector, shape.dtype == Dtype::kFloat32 ? kUnroll16 / 2 : kUnroll16,
                     blocks_per_multiprocessor(projection), bytes_of(shape.dtype) * (projection ? 3 : 2)},
                    limits);
}

template <class T, int V, bool kProjection>
cudaError_t launch_reduce(const BnAddReluBackwardReduce& args, Workspace& workspace, const DeviceLimits& limits,
                          cudaStream_t stream) {
  const TilePlan plan = plan_of(args.shape, V, kProjection, limits);
  const cudaError_t error = prepare_workspace(workspace, plan, kValues<V, kProjection>, stream);
  if (error != cudaSuccess) return error;
  const auto start = [&](auto kernel) {
    return launch(kernel, dim3(unsigned(plan.chunks), unsigned(plan.groups)), dim3(unsigned(plan.threads())), stream,
                  args, plan, workspace.data);
  };
  if (args.mask == nullptr && args.relu)
    return start(bn_add_relu_backward_reduce_kernel<T, V, Gate::kSign, kProjection>);
  return start(bn_add_relu_backward_reduce_kernel<T, V, Gate::kBits, kProjection>);
}

}  // namespace

size_t bn_add_relu_backward_reduce_workspace(const Shape& shape) {
  DeviceLimits limits;
  if (current_device_limits(&limits) != cudaSuccess) return 0;
  return std::max({plan_of(shape, kPacket, false, limits).workspace_bytes(kValues<kPacket, false>),
                   plan_of(shape, kPacket, true, limits).workspace_bytes(kValues<kPacket, true>),
                   plan_of(shape, 1, false, limits).workspace_bytes(kValues<1, false>),
                   plan_of(shape, 1, true, limits).workspace_bytes(kValues<1, true>)});
}

cudaError_t bn_add_relu_backward_reduce(const BnAddReluBackwardReduce& args, Workspace& workspace,
                                        cudaStream_t stream) {
  if (args.shape.channels == 0) return cudaSuccess;
  DeviceLimits limits;
  const cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  const bool packets = args.shape.channels % kPacket == 0 && aligned_to_16(args.dy, args.c, args.shortcut_c, args.mean,
                                                                           args.scale, args.shift, args.shortcut_mean);
  return for_dtype(args.shape.dtype, [&](auto type) {
    return for_flag(packets, [&](auto by_packet) {
      return for_flag(args.shortcut_sum != nullptr, [&](auto projection) {
        using T = typename decltype(type)::type;
        return launch_reduce<T, by_packet ? kPacket : 1, projection>(args, workspace, limits, stream);
      });
    });
  });
}

}  // namespace fusedres::cuda
