// Eight floats. Everything is in an unnamed namespace: kernels.h says why no function here may have linkage.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct BFloat16 {
  uint16_t bits;
};

using Float = __m256;
using Int = __m256i;
using Keep = __m256;  // all ones or all zeros a lane
constexpr int64_t kWidth = 8;

inline Float zero() { return _mm256_setzero_ps(); }
inline Float set(float v) { return _mm256_set1_ps(v); }
inline Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
inline Float select(Keep keep, Float v) { return _mm256_and_ps(keep, v); }
inline Float select(Keep keep, Float yes, Float no) { return _mm256_blendv_ps(no, yes, keep); }
inline Int select(Keep keep, Int yes, Int no) { return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(keep)); }
inline Keep either(Keep a, Keep b) { return _mm256_or_ps(a, b); }

// maxps gives its second operand if either operand is NaN: relu(NaN) stays NaN
inline Float relu(Float v) { return _mm256_max_ps(zero(), v); }
inline Float larger(Float a, Float b) { return _mm256_max_ps(a, b); }  // b if a or b is NaN
inline Float smaller(Float a, Float b) { return _mm256_min_ps(a, b); }
inline Keep positive_or_nan(Float v) { return _mm256_cmp_ps(v, zero(), _CMP_NLE_UQ); }
inline Keep greater(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
inline bool any(Keep keep) { return _mm256_movemask_ps(keep) != 0; }
inline Keep is_nan(Float v) { return _mm256_cmp_ps(v, v, _CMP_UNORD_Q); }
inline Keep equal(Int a, Int b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
inline Int set_int(int v) { return _mm256_set1_epi32(v); }

inline Keep unpack_bits(const uint8_t* mask) {
  const Int bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return equal(_mm256_and_si256(_mm256_set1_epi32(*mask), bit), bit);
}
inline void pack_bits(uint8_t* mask, Keep keep) { *mask = uint8_t(_mm256_movemask_ps(keep)); }

// The value as T stores it. BFloat16 rounds to nearest even, and every NaN becomes the NaN that torch writes.
template <class T>
inline Float rounded(Float v);
template <>
inline Float rounded<float>(Float v) {
  return v;
}
template <>
inline Float rounded<BFloat16>(Float v) {
  const Int bits = _mm256_castps_si256(v);
  const Int odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), set_int(1));
  const Int up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, set_int(0x7fff)));
  const Int high = _mm256_and_si256(up, set_int(int(0xffff0000)));
  return select(is_nan(v), _mm256_castsi256_ps(set_int(0x7fc00000)), _mm256_castsi256_ps(high));
}

inline float word(const void* p) {  // two values of bfloat16 may lie at any even address
  float v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Float repeat(const float* p) { return _mm256_set1_ps(word(p)); }
inline Float load(const float* p) { return _mm256_loadu_ps(p); }
inline Float load(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// Each lane holds the bits of two values: of `low` in the lower half, of `high` in the upper half.
inline Float load_pairs(const BFloat16* low, const BFloat16* high) {
  const Int halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
  return _mm256_castsi256_ps(_mm256_or_si256(halves, _mm256_castps_si256(load(high))));
}

// v, with the upper half of each lane cleared.
inline Float lower_halves(Float v) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(v), set_int(0xffff)));
}

// Lane i is lane places[i] of v.
inline Float permuted(Float v, const int32_t* places) {
  return _mm256_permutevar8x32_ps(v, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places)));
}

// Stores a `v` that `rounded` returned.
inline void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
inline void store(BFloat16* p, Float v) {
  const Int high = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
  const Int packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

// As `store`, to memory itself, where nothing is read before. p is aligned to the vector. `fence_past_caches` comes
// before another thread reads.
inline void store_past_caches(float* p, Float v) { _mm256_stream_ps(p, v); }
inline void store_past_caches(BFloat16* p, Float v) { store(p, v); }
inline void fence_past_caches() { _mm_sfence(); }

inline Int load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline void store_bytes(uint8_t* p, Int v) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

// Lane j of v[i] and lane i of v[j] change places.
inline void transpose(Float (&v)[kWidth]) {
  Float pairs[kWidth], fours[kWidth];
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    const Float *low = pairs + 4 * i, *high = low + 2;
    fours[4 * i] = _mm256_shuffle_ps(low[0], high[0], 0x44);
    fours[4 * i + 1] = _mm256_shuffle_ps(low[0], high[0], 0xee);
    fours[4 * i + 2] = _mm256_shuffle_ps(low[1], high[1], 0x44);
    fours[4 * i + 3] = _mm256_shuffle_ps(low[1], high[1], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x20);
    v[4 + i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x31);
  }
}

// sums[i] += v[i]
inline void add_to_double(double* sums, Float v) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
  const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), low));
  _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), high));
}

// sums[i] += factor * a[i] * b[i], in double
inline void add_product_to_double(double* sums, double factor, Float a, Float b) {
  const auto add = [&](double* at, __m128 x, __m128 y) {
    const __m256d product = _mm256_mul_pd(_mm256_cvtps_pd(x), _mm256_cvtps_pd(y));
    _mm256_storeu_pd(at, _mm256_fmadd_pd(_mm256_set1_pd(factor), product, _mm256_loadu_pd(at)));
  };
  add(sums, _mm256_castps256_ps128(a), _mm256_castps256_ps128(b));
  add(sums + 4, _mm256_extractf128_ps(a, 1), _mm256_extractf128_ps(b, 1));
}

}  // namespace
