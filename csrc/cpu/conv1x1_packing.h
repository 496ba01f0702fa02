// A 1x1 convolution's weight as panels of the columns of a product. Included after vec_avx2.h or vec_avx512.h.
#pragma once

#include "kernels.h"
#include "words.h"

namespace {

using namespace fusedres::cpu;

constexpr int64_t kRowsAhead = 16;  // rows of W to prefetch: each lies in a page of its own

// Packs W [out_channels, in_channels] as [panel][out_channels][kPanelIn], panels [begin, end). A word of bfloat16 holds
// two output channels. Columns beyond the last channel are 0.
template <class T>
void pack_weight(const PackArgs& args, int64_t begin, int64_t end) {
  const int64_t step = kPerWord<T> * args.in_channels, depth = args.out_channels / kPerWord<T>;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t channel = panel * kPanelIn, left = args.in_channels - channel;
    float* packed = args.packed + channel * depth;
    const T* weight = static_cast<const T*>(args.weight) + channel;
    for (int64_t o = 0; o < depth; ++o, weight += step, packed += kPanelIn) {
      for (int64_t i = 0; i < kPanelIn; i += kLine<T>) _mm_prefetch(weight + kRowsAhead * step + i, _MM_HINT_T0);
      store_words(packed, weight, args.in_channels, left);
    }
  }
}

// Transposes four rows of four words, `pitch` apart, to four rows of a panel, kPanelIn apart.
inline void transpose(const float* weight, int64_t pitch, float* packed) {
  __m128 a = _mm_loadu_ps(weight), b = _mm_loadu_ps(weight + pitch);
  __m128 c = _mm_loadu_ps(weight + 2 * pitch), d = _mm_loadu_ps(weight + 3 * pitch);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(packed, a);
  _mm_storeu_ps(packed + kPanelIn, b);
  _mm_storeu_ps(packed + 2 * kPanelIn, c);
  _mm_storeu_ps(packed + 3 * kPanelIn, d);
}

// Packs W [out_channels, in_channels] as [panel][in_channels][kPanelIn], with panels of output channels.
template <class T>
void pack_weight_transposed(const PackArgs& args, int64_t begin, int64_t end) {
  const int64_t depth = args.in_channels / kPerWord<T>;
  for (int64_t panel = begin; panel < end; ++panel) {
    float* packed = args.packed + panel * kPanelIn * depth;
    for (int64_t lane = 0; lane < kPanelIn; lane += 4) {
      const int64_t out = panel * kPanelIn + lane;
      const float* weight = static_cast<const float*>(args.weight) + out * depth;
      int64_t i = 0;
      if (out + 4 <= args.out_channels) {
        for (; i + 4 <= depth; i += 4) transpose(weight + i, depth, packed + i * kPanelIn + lane);
      }
      for (; i < depth; ++i) {
        for (int64_t l = 0; l < 4; ++l) {
          packed[i * kPanelIn + lane + l] = out + l < args.out_channels ? word(weight + l * depth + i) : 0;
        }
      }
    }
  }
}

}  // namespace
