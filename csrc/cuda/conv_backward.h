// What the input gradients of convolutions have before their product, BN's backward, and after it, the shortcut's
// gradient. Args: Conv1x1BackwardInput, or a struct that has its fields
#pragma once

#include "product_output.h"

namespace fusedres::cuda {

// Half a chunk in global memory, as load_part and store_part have a chunk.
template <class T>
__device__ __forceinline__ uint2 load_half(const T* from, int valid, bool packets) {
  if (packets) return load_8_bytes(from);
  Packet<T, kHalf> half;
#pragma unroll
  for (int e = 0; e < kHalf; ++e) half.value[e] = e < valid ? from[e] : round_to<T>(0.f);
  uint2 word;
  memcpy(&word, &half, sizeof word);
  return word;
}
template <class T>
__device__ __forceinline__ void store_half(T* to, uint2 word, int valid, bool packets) {
  if (packets) return store_8_bytes(to, word);
  Packet<T, kHalf> half;
  memcpy(&half, &word, sizeof half);
#pragma unroll
  for (int e = 0; e < kHalf; ++e)
    if (e < valid) to[e] = half.value[e];
}

// Whether there is a ReLU, and where its scale comes from: it is A, but for what a caller makes up.
enum class Relu { kNone, kScaleIsA, kAny };  // kAny: as the arguments have it

// Four channels of scale, shift, A, B and K: of all eight channels of a chunk they would not fit the registers.
struct ChannelVectors {
  float4 scale, shift, A, B, K;

  // training: whether B and K are there
  template <class Args>
  __device__ __forceinline__ ChannelVectors(const Args& args, int first, bool packets, bool training, Relu relu) {
    B = K = make_float4(0.f, 0.f, 0.f, 0.f);
    shift = make_float4(INFINITY, INFINITY, INFINITY, INFINITY);  // without ReLU nothing is gated, whatever scale is
    const auto load = [&](const float* vector) {
      return load_vector_half(vector, first, int(args.out_channels), packets);
    };
    scale = A = load(args.grads.A);
    if (relu == Relu::kScaleIsA || (relu == Relu::kAny && args.relu)) shift = load(args.shift);
    if (relu == Relu::kAny && args.relu) scale = load(args.scale);
    if (training) B = load(args.grads.B), K = load(args.grads.K);
  }
};

// The largest value that rounds to 0: half of the smallest subnormal number.
template <class T>
constexpr float kLargestZero = std::is_same_v<T, __half> ? 0x1p-25f : 0x1p-134f;

// dc of 4 channels of a row, from dy and c.
template <class T>
__device__ __forceinline__ uint2 differentiated(uint2 dy_word, uint2 c_word, const ChannelVectors& vectors,
                                                bool training) {
  Packet<T, kHalf> dy, c;
  memcpy(&dy, &dy_word, sizeof dy);
  memcpy(&c, &c_word, sizeof c);
  const float *scale = &vectors.scale.x, *shift = &vectors.shift.x;
  const float *A = &vectors.A.x, *B = &vectors.B.x, *K = &vectors.K.x;
  float dc[kHalf];
#pragma unroll
  for (int e = 0; e < kHalf; ++e) {
    const float c_value = value_of(c, e);
    const bool gated = affine(c_value, scale[e], shift[e]) <= kLargestZero<T>;  // as `passes` of what it rounds to
    const float dz = gated ? 0.f : value_of(dy, e);
    dc[e] = apply_coefficients(dz, c_value, A[e], B[e], K[e], training);
  }
  return make_uint2(round_pair<T>(dc[0], dc[1]), round_pair<T>(dc[2], dc[3]));
}

// dx of a row's 8 channels, `valid` of which exist.
template <class T, class Args>
__device__ __forceinline__ void store_gradient(const Args& args, int64_t place, int valid, bool packets,
                                               const float (&value)[kPacket]) {
  Packet<T, kPacket> out, shortcut;
  unsigned bits = 0xffu;
  if (args.shortcut_dy != nullptr) {
    shortcut = load_part(static_cast<const T*>(args.shortcut_dy) + place, valid, packets);
    if (args.mask != nullptr) bits = bits_at(args.mask, place, valid < kPacket ? valid : kPacket);
  }
#pragma unroll
  for (int i = 0; i < kPacket; ++i) {
    const bool added = args.shortcut_dy != nullptr && (bits >> i & 1u);
    out.value[i] = round_to<T>(added ? value[i] + to_float(shortcut.value[i]) : value[i]);
  }
  store_part(static_cast<T*>(args.dx) + place, out, valid, packets);
}

}  // namespace fusedres::cuda
