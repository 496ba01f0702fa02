// Sixteen floats, with the functions of vec_avx2.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct BFloat16 {
  uint16_t bits;
};

using Float = __m512;
using Int = __m512i;
using Keep = __mmask16;
constexpr int64_t kWidth = 16;

inline Float zero() { return _mm512_setzero_ps(); }
inline Float set(float v) { return _mm512_set1_ps(v); }
inline Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
inline Float select(Keep keep, Float v) { return _mm512_maskz_mov_ps(keep, v); }
inline Float select(Keep keep, Float yes, Float no) { return _mm512_mask_blend_ps(keep, no, yes); }
inline Int select(Keep keep, Int yes, Int no) { return _mm512_mask_blend_epi32(keep, no, yes); }
inline Keep either(Keep a, Keep b) { return Keep(a | b); }

// maxps gives its second operand if either operand is NaN: relu(NaN) stays NaN
inline Float relu(Float v) { return _mm512_max_ps(zero(), v); }
inline Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }  // b if a or b is NaN
inline Float smaller(Float a, Float b) { return _mm512_min_ps(a, b); }
inline Keep positive_or_nan(Float v) { return _mm512_cmp_ps_mask(v, zero(), _CMP_NLE_UQ); }
inline Keep greater(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline bool any(Keep keep) { return keep != 0; }
inline Keep is_nan(Float v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }
inline Keep equal(Int a, Int b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline Int set_int(int v) { return _mm512_set1_epi32(v); }

inline Keep unpack_bits(const uint8_t* mask) { return Keep(mask[0] | mask[1] << 8); }
inline void pack_bits(uint8_t* mask, Keep keep) {
  mask[0] = uint8_t(keep);
  mask[1] = uint8_t(keep >> 8);
}

// The value as T stores it. BFloat16 rounds to nearest even, and every NaN becomes the NaN that torch writes.
template <class T>
inline Float rounded(Float v);
template <>
inline Float rounded<float>(Float v) {
  return v;
}
template <>
inline Float rounded<BFloat16>(Float v) {
  const Int bits = _mm512_castps_si512(v);
  const Int odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set_int(1));
  const Int up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, set_int(0x7fff)));
  const Int high = _mm512_and_si512(up, set_int(int(0xffff0000)));
  return select(is_nan(v), _mm512_castsi512_ps(set_int(0x7fc00000)), _mm512_castsi512_ps(high));
}

inline float word(const void* p) {  // two values of bfloat16 may lie at any even address
  float v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Float repeat(const float* p) { return _mm512_set1_ps(word(p)); }
inline Float load(const float* p) { return _mm512_loadu_ps(p); }
inline Float load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Each lane holds the bits of two values: of `low` in the lower half, of `high` in the upper half.
inline Float load_pairs(const BFloat16* low, const BFloat16* high) {
  const Int halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  return _mm512_castsi512_ps(_mm512_or_si512(halves, _mm512_castps_si512(load(high))));
}

// v, with the upper half of each lane cleared.
inline Float lower_halves(Float v) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), set_int(0xffff)));
}

// Lane i is lane places[i] of v.
inline Float permuted(Float v, const int32_t* places) { return _mm512_permutexvar_ps(_mm512_loadu_si512(places), v); }

// Stores a `v` that `rounded` returned.
inline void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
inline void store(BFloat16* p, Float v) {
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}

// As `store`, to memory itself, where nothing is read before. p is aligned to the vector. `fence_past_caches` comes
// before another thread reads.
inline void store_past_caches(float* p, Float v) { _mm512_stream_ps(p, v); }
inline void store_past_caches(BFloat16* p, Float v) { store(p, v); }
inline void fence_past_caches() { _mm_sfence(); }

inline Int load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_bytes(uint8_t* p, Int v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }

// Lane j of v[i] and lane i of v[j] change places.
inline void transpose(Float (&v)[kWidth]) {
  Float pairs[kWidth], fours[kWidth];
  for (int i = 0; i < 8; ++i) {
    pairs[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d low[] = {_mm512_castps_pd(pairs[4 * i]), _mm512_castps_pd(pairs[4 * i + 1])};
    const __m512d high[] = {_mm512_castps_pd(pairs[4 * i + 2]), _mm512_castps_pd(pairs[4 * i + 3])};
    for (int j = 0; j < 2; ++j) {
      fours[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low[j], high[j]));
      fours[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low[j], high[j]));
    }
  }
  for (int i = 0; i < 4; ++i) {
    const Float even_low = _mm512_shuffle_f32x4(fours[i], fours[4 + i], 0x88);
    const Float odd_low = _mm512_shuffle_f32x4(fours[i], fours[4 + i], 0xdd);
    const Float even_high = _mm512_shuffle_f32x4(fours[8 + i], fours[12 + i], 0x88);
    const Float odd_high = _mm512_shuffle_f32x4(fours[8 + i], fours[12 + i], 0xdd);
    v[i] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    v[4 + i] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    v[8 + i] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    v[12 + i] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}

// sums[i] += v[i]
inline void add_to_double(double* sums, Float v) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
}

// sums[i] += factor * a[i] * b[i], in double
inline void add_product_to_double(double* sums, double factor, Float a, Float b) {
  const auto add = [&](double* at, __m256 x, __m256 y) {
    const __m512d product = _mm512_mul_pd(_mm512_cvtps_pd(x), _mm512_cvtps_pd(y));
    _mm512_storeu_pd(at, _mm512_add_pd(_mm512_loadu_pd(at), _mm512_mul_pd(_mm512_set1_pd(factor), product)));
  };
  add(sums, _mm512_castps512_ps256(a), _mm512_castps512_ps256(b));
  add(sums + 8, _mm512_extractf32x8_ps(a, 1), _mm512_extractf32x8_ps(b, 1));
}

}  // namespace
