// Vectors of which only the first `lanes` are in memory: the channels that are left at the end of a position. Included
// after vec_avx2.h or vec_avx512.h.
#pragma once

#include <cstdint>

#define FUSEDRES_INLINE inline __attribute__((always_inline))

namespace {

// The other lanes are 0.
template <class T>
inline Float load_lanes(const T* p, int64_t lanes) {
  if (lanes >= kWidth) return load(p);
  T lane[kWidth] = {};
  for (int64_t i = 0; i < lanes; ++i) lane[i] = p[i];
  return load(lane);
}

template <class T>
inline void store_lanes(T* p, Float v, int64_t lanes) {
  if (lanes >= kWidth) return store(p, v);
  T lane[kWidth];
  store(lane, v);
  for (int64_t i = 0; i < lanes; ++i) p[i] = lane[i];
}

inline Int load_bytes_lanes(const uint8_t* p, int64_t lanes) {
  if (lanes >= kWidth) return load_bytes(p);
  uint8_t lane[kWidth] = {};
  for (int64_t i = 0; i < lanes; ++i) lane[i] = p[i];
  return load_bytes(lane);
}

inline void store_bytes_lanes(uint8_t* p, Int v, int64_t lanes) {
  if (lanes >= kWidth) return store_bytes(p, v);
  uint8_t lane[kWidth];
  store_bytes(lane, v);
  for (int64_t i = 0; i < lanes; ++i) p[i] = lane[i];
}

inline Keep unpack_bits_lanes(const uint8_t* mask, int64_t lanes) {
  if (lanes >= kWidth) return unpack_bits(mask);
  uint8_t bytes[kWidth / 8] = {};
  for (int64_t i = 0; i < (lanes + 7) / 8; ++i) bytes[i] = mask[i];
  return unpack_bits(bytes);
}

}  // namespace
