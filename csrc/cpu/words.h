// Operands of products as words of 32 bits. A word is one float, or two values of bfloat16 whose products are added.
// Included after vec_avx2.h or vec_avx512.h.
#pragma once

#include "lanes.h"
#include "tiles.h"

namespace {

template <class T>
constexpr int64_t kPerWord = sizeof(float) / sizeof(T);

template <class T>
inline Float multiply_add(Float a, Float b, Float sum);
template <>
inline Float multiply_add<float>(Float a, Float b, Float sum) {
  return fma(a, b, sum);
}
#ifdef __AVX512BF16__
template <>
inline Float multiply_add<BFloat16>(Float a, Float b, Float sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif

// The words of `lanes` values at p, up to kWidth. A value of bfloat16 is paired with the value `pitch` further.
inline Float words(const float* p, int64_t, int64_t lanes) { return load_lanes(p, lanes); }
inline Float words(const BFloat16* p, int64_t pitch, int64_t lanes) {
  if (lanes >= kWidth) return load_pairs(p, p + pitch);
  BFloat16 low[kWidth] = {}, high[kWidth] = {};
  for (int64_t i = 0; i < lanes; ++i) {
    low[i] = p[i];
    high[i] = p[pitch + i];
  }
  return load_pairs(low, high);
}

// Stores one row of a packed panel, from `lanes` values, with zeros after the last.
template <class T>
inline void store_words(float* packed, const T* p, int64_t pitch, int64_t lanes) {
  store(packed, words(p, pitch, lanes));
  store(packed + kWidth, lanes > kWidth ? words(p + kWidth, pitch, lanes - kWidth) : zero());
}

}  // namespace
