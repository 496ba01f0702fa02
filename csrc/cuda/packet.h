// Packets of V neighbouring channels: loads, stores, and rounding to the activation dtype.
#pragma once

#include "plan.h"
#include "platform.h"

namespace fusedres::cuda {

__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(float v) { return v; }

// Rounds to nearest even, as torch does.
template <class T>
__device__ __forceinline__ T round_to(float v);
template <>
__device__ __forceinline__ __half round_to<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ float round_to<float>(float v) {
  return v;
}

// Two values, each rounded so, in one register, the first in its low half.
template <class T>
__device__ __forceinline__ uint32_t round_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t round_pair<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
template <>
__device__ __forceinline__ uint32_t round_pair<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

template <class T, int V>
struct Packet {
  T value[V];
};

// Value i of a packet. A bfloat16 is the upper half of a float, and of every other word it is in its place.
template <int V>
__device__ __forceinline__ float value_of(const Packet<__half, V>& packet, int i) {
  return to_float(packet.value[i]);
}
template <int V>
__device__ __forceinline__ float value_of(const Packet<__nv_bfloat16, V>& packet, int i) {
  uint32_t word;
  memcpy(&word, &packet.value[i & ~1], sizeof word);
  const uint32_t bits = i & 1 ? word & 0xffff0000u : word << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
constexpr int kWordsPerPacket = int(sizeof(T)) * kPacket / 16;  // 16-byte words

// A thread handles several packets of a 16-bit dtype at once, so that loads overlap. A float32 packet is two loads
// already.
template <class T, int Of16Bit>
constexpr int kUnroll = sizeof(T) == 2 ? Of16Bit : Of16Bit / 2;

template <class T>
__device__ __forceinline__ Packet<T, kPacket> load_packet(const T* from, uint64_t policy) {
  uint4 word[kWordsPerPacket<T>];
#pragma unroll
  for (int i = 0; i < kWordsPerPacket<T>; ++i)
    word[i] = load_16_bytes(reinterpret_cast<const char*>(from) + 16 * i, policy);
  Packet<T, kPacket> packet;
  memcpy(&packet, word, sizeof packet);
  return packet;
}

template <class T>
__device__ __forceinline__ void store_packet(T* to, const Packet<T, kPacket>& packet, uint64_t policy) {
  uint4 word[kWordsPerPacket<T>];
  memcpy(word, &packet, sizeof packet);
#pragma unroll
  for (int i = 0; i < kWordsPerPacket<T>; ++i) store_16_bytes(reinterpret_cast<char*>(to) + 16 * i, word[i], policy);
}

// V = 8: aligned to 16 bytes; V = 1: any address.
template <class T, int V>
__device__ __forceinline__ Packet<T, V> load_channels(const T* from, uint64_t policy) {
  if constexpr (V == kPacket) {
    return load_packet(from, policy);
  } else {
    return {*from};
  }
}

template <class T, int V>
__device__ __forceinline__ void store_channels(T* to, const Packet<T, V>& packet, uint64_t policy) {
  if constexpr (V == kPacket) {
    store_packet(to, packet, policy);
  } else {
    *to = packet.value[0];
  }
}

// V pooling indices. V = 8: aligned to 8 bytes.
template <int V>
__device__ __forceinline__ Packet<uint8_t, V> load_indices(const uint8_t* from) {
  Packet<uint8_t, V> out;
  if constexpr (V == kPacket) {
    const uint2 word = load_8_bytes(from);
    memcpy(&out, &word, sizeof out);
  } else {
    out.value[0] = *from;
  }
  return out;
}

template <int V>
__device__ __forceinline__ void store_indices(uint8_t* to, const Packet<uint8_t, V>& indices) {
  if constexpr (V == kPacket) {
    uint2 word;
    memcpy(&word, &indices, sizeof word);
    store_8_bytes(to, word);
  } else {
    *to = indices.value[0];
  }
}

// V values of a channel vector [C] from channel `first`; null reads as 0.
template <int V>
__device__ __forceinline__ void load_vector(float (&out)[V], const float* vector, int64_t first) {
  if (vector == nullptr) {
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = 0.f;
  } else if constexpr (V == kPacket) {
    const Packet<float, kPacket> packet = load_packet(vector + first, l2_policy(true));
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = packet.value[i];
  } else {
    out[0] = vector[first];
  }
}

}  // namespace fusedres::cuda
