// Stands before the compiler's own header: AVX-512 by SIMDe, over AVX2, under the intrinsics' names.
#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// What SIMDe lacks: conversions, by the compiler's generic vectors, and stores past the caches.
namespace {

template <class T, int bytes>
using Vector __attribute__((vector_size(bytes))) = T;

template <class To, class From, class Result, class Argument>
inline Result converted(Argument v) {
  return (Result) __builtin_convertvector((From)v, To);
}

inline __m256i cvtepi32_epi16(__m512i v) { return converted<Vector<short, 32>, Vector<int, 64>, __m256i>(v); }
inline __m128i cvtepi32_epi8(__m512i v) { return converted<Vector<char, 16>, Vector<int, 64>, __m128i>(v); }
inline __m512i cvtepu8_epi32(__m128i v) { return converted<Vector<int, 64>, Vector<unsigned char, 16>, __m512i>(v); }
inline __m512d cvtps_pd(__m256 v) { return converted<Vector<double, 64>, Vector<float, 32>, __m512d>(v); }

inline void stream_ps(float* p, __m512 v) { _mm512_store_ps(p, v); }

}  // namespace

#define _mm512_stream_ps stream_ps
#define _mm512_cvtepi32_epi16 cvtepi32_epi16
#define _mm512_cvtepi32_epi8 cvtepi32_epi8
#define _mm512_cvtepu8_epi32 cvtepu8_epi32
#define _mm512_cvtps_pd cvtps_pd
