// How a thread goes through its share of a tensor, several loads ahead.
#pragma once

#include "packet.h"

namespace fusedres::cuda {

// One thread's place in a TilePlan.
struct TileThread {
  int64_t channel;  // the first of V
  int64_t row;      // the first; the next lie row_stride() apart
  bool active;      // false for lanes past the last channel

  __device__ __forceinline__ explicit TileThread(const TilePlan& plan)
      : channel(plan.first_channel(blockIdx.x, int(threadIdx.x))),
        row(plan.first_row(blockIdx.y, int(threadIdx.x))),
        active(channel < plan.channels) {}
};

// use(i, load(i)) for i = first, first + stride, ... < end; U loads are issued before the first use.
template <int U, class Load, class Use>
__device__ __forceinline__ void walk(int64_t first, int64_t stride, int64_t end, Load load, Use use) {
  int64_t i = first;
  for (; i + (U - 1) * stride < end; i += U * stride) {
    decltype(load(i)) staged[U];
#pragma unroll
    for (int u = 0; u < U; ++u) staged[u] = load(i + u * stride);
#pragma unroll
    for (int u = 0; u < U; ++u) use(i + u * stride, staged[u]);
  }
  for (; i < end; i += stride) use(i, load(i));
}

// Packet `packet` of a flat tensor [numel], loaded in 16-byte words if kFixed. Else it is loaded element by element
// where the tensor is not aligned or ends inside the packet. Elements past the end read as 0.
template <bool kFixed, class T>
__device__ __forceinline__ Packet<T, kPacket> load_flat(const T* tensor, int64_t packet, const PacketPlan& plan,
                                                        uint64_t policy) {
  const int64_t first = packet * kPacket;
  if constexpr (kFixed) {
    return load_packet(tensor + first, policy);
  } else {
    if (plan.aligned && first + kPacket <= plan.numel) return load_packet(tensor + first, policy);
    Packet<T, kPacket> out;
#pragma unroll
    for (int i = 0; i < kPacket; ++i) out.value[i] = first + i < plan.numel ? tensor[first + i] : round_to<T>(0.f);
    return out;
  }
}

template <bool kFixed, class T>
__device__ __forceinline__ void store_flat(T* tensor, int64_t packet, const Packet<T, kPacket>& values,
                                           const PacketPlan& plan, uint64_t policy) {
  const int64_t first = packet * kPacket;
  if constexpr (kFixed) {
    store_packet(tensor + first, values, policy);
  } else {
    if (plan.aligned && first + kPacket <= plan.numel) return store_packet(tensor + first, values, policy);
#pragma unroll
    for (int i = 0; i < kPacket; ++i)
      if (first + i < plan.numel) tensor[first + i] = values.value[i];
  }
}

// The values of a channel vector [C] for the 8 elements of a packet; null reads as 0.
template <bool kFixed>
__device__ __forceinline__ void load_vector_flat(float (&out)[kPacket], const float* vector, int64_t packet,
                                                 const PacketPlan& plan) {
  int64_t channel = plan.first_channel(packet);
  if constexpr (kFixed) {
    load_vector(out, vector, channel);
  } else {
#pragma unroll
    for (int i = 0; i < kPacket; ++i) {
      out[i] = vector == nullptr ? 0.f : vector[channel];
      if (++channel == plan.channels) channel = 0;
    }
  }
}

// One bit for each element of a packet that lies inside the tensor.
__device__ __forceinline__ unsigned valid_bits(int64_t packet, const PacketPlan& plan) {
  const int64_t left = plan.numel - packet * kPacket;
  return left >= kPacket ? 0xffu : (1u << left) - 1u;
}

}  // namespace fusedres::cuda
