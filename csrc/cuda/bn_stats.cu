// Batch statistics: shifted sums per thread, then merges of (mean, M2, count) by Chan, Golub & LeVeque 1983.
// The merged means are relative to a pivot, the mean of a few rows of c. The pivot is off by a fraction of std only, so
// the means keep their digits where mean/std is large and where it is small.
#include "bn_math.h"
#include "launch.h"
#include "tile_reduce.h"

namespace fusedres::cuda {

namespace {
constexpr int kUnroll16 = 4;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kPivotRows = 8;
template <int V>
constexpr int kValues = 2 * V + 1;  // mean - pivot [V], M2 [V], count
}  // namespace

template <int V>
struct MomentMerge {
  template <class Other>
  __device__ __forceinline__ void operator()(float (&a)[kValues<V>], Other b) const {
    const float n_a = a[2 * V], n_b = b(2 * V);
    if (n_b == 0.f) return;
    const float n = n_a + n_b, weight = n_b / n;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float delta = b(i) - a[i], m2 = b(V + i);
      a[V + i] = a[V + i] + m2 + delta * (delta * (n_a * weight));
      a[i] = fmaf(delta, weight, a[i]);
    }
    a[2 * V] = n;
  }
};

// The mean of a few rows of c, [P, C] from some channel on. Every thread of a channel computes an equal pivot.
template <class T, int V>
__device__ __forceinline__ void pivot(const T* c, const TilePlan& plan, float (&value)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) value[i] = 0.f;
#pragma unroll
  for (int k = 0; k < kPivotRows; ++k) {
    const Packet<T, V> row = load_channels<T, V>(c + plan.rows * k / kPivotRows * plan.channels, l2_policy(true));
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] = fmaf(to_float(row.value[i]), 1.f / kPivotRows, value[i]);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor)
    bn_stats_kernel(BnStats args, TilePlan plan, void* workspace) {
  FUSEDRES_SHARED(float, shared, kMergeFloats<kValues<V>>);
  const TileThread me(plan);
  const T* c = static_cast<const T*>(args.c) + me.channel;  // [P, C], from this thread's channels
  const int64_t rows = me.active ? plan.rows_of_thread(me.row) : 0;
  float acc[kValues<V>] = {};
  if (rows > 0) {
    // A shift near the data makes sum and sum of squares safe. The thread's own first row needs no earlier pass.
    float shift[V], sum[V] = {}, square[V] = {};
    const Packet<T, V> first = load_channels<T, V>(c + me.row * plan.channels, l2_policy(false));
#pragma unroll
    for (int i = 0; i < V; ++i) shift[i] = to_float(first.value[i]);
    walk<kUnroll<T, kUnroll16>>(
        me.row, plan.row_stride(), plan.rows,
        [&](int64_t row) {
          return load_channels<T, V>(c + row * plan.channels, l2_policy(row >= plan.rows - plan.kept));
        },
        [&](int64_t, const Packet<T, V>& packet) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const float x = to_float(packet.value[i]) - shift[i];
            sum[i] += x;
            square[i] = fmaf(x, x, square[i]);
          }
        });
    const float n = float(rows);
    float reference[V];
    pivot<T, V>(c, plan, reference);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float mean = sum[i] / n, m2 = square[i] - sum[i] * mean;
      acc[i] = shift[i] - reference[i] + mean;
      acc[V + i] = m2 < 0.f ? 0.f : m2;
    }
    acc[2 * V] = n;
  }
  reduce_tile<V>(acc, shared, workspace, plan, MomentMerge<V>(), [&](int64_t channel, auto moment) {
    const float var = moment(1) / float(plan.rows);
    float mean = var;  // an infinity makes the mean NaN too, as in torch's Welford, and so does an empty tensor
    if (!isnan(var)) {
      float reference[1];
      pivot<T, 1>(static_cast<const T*>(args.c) + channel, plan, reference);
      mean = reference[0] + moment(0);
    }
    args.mean[channel] = mean;
    args.var[channel] = var;
    if (args.scale_shift.scale != nullptr) scale_shift_of_channel(args.scale_shift, channel, mean, var);
  });
}

namespace {
TilePlan plan_of(const Shape& shape, int vector, const DeviceLimits& limits) {
  return plan_tiles({shape.rows, shape.channels, vector, shape.dtype == Dtype::kFloat32 ? kUnroll16 / 2 : kUnroll16,
                     kBlocksPerMultiprocessor, bytes_of(shape.dtype)},
                    limits);
}
}  // namespace

size_t bn_stats_workspace(const Shape& shape) {
  DeviceLimits limits;
  if (current_device_limits(&limits) != cudaSuccess) return 0;
  return std::max(plan_of(shape, kPacket, limits).workspace_bytes(kValues<kPacket>),
                  plan_of(shape, 1, limits).workspace_bytes(kValues<1>));
}

cudaError_t bn_stats(const BnStats& args, Workspace& workspace, cudaStream_t stream) {
  const Shape& shape = args.shape;
  if (shape.channels == 0) return cudaSuccess;
  DeviceLimits limits;
  cudaError_t error = current_device_limits(&limits);
  if (error != cudaSuccess) return error;
  const bool packets = shape.channels % kPacket == 0 && aligned_to_16(args.c);
  return for_dtype(shape.dtype, [&](auto type) {
    return for_flag(packets, [&](auto by_packet) {
      using T = typename decltype(type)::type;
      constexpr int V = by_packet ? kPacket : 1;
      const TilePlan plan = plan_of(shape, V, limits);
      const cudaError_t error = prepare_workspace(workspace, plan, kValues<V>, stream);
      if (error != cudaSuccess) return error;
      return launch(bn_stats_kernel<T, V>, dim3(unsigned(plan.chunks), unsigned(plan.groups)),
                    dim3(unsigned(plan.threads())), stream, args, plan, workspace.data);
    });
  });
}

}  // namespace fusedres::cuda
