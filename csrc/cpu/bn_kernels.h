// Batch normalisation, addition and ReLU, both ways. Included after vec_avx2.h or vec_avx512.h.
#pragma once

#include "kernels.h"
#include "lanes.h"
#include "select.h"

namespace {

using namespace fusedres::cpu;

constexpr int64_t kFlush = 256;  // rows that are summed in float before the sum goes to double
constexpr int64_t kGroup = 4;    // rows that share one load and store of the partial sums

// Calls `group(row, size)` for groups of kGroup rows, and for each row that is left after the last group. After every
// kFlush rows the sums in `partial` [length] are added to `totals`.
template <class F>
inline void for_groups(float* partial, double* totals, int64_t length, int64_t begin, int64_t end, F group) {
  for (int64_t block = begin; block < end; block += kFlush) {
    const int64_t stop = block + kFlush < end ? block + kFlush : end;
    for (int64_t i = 0; i < length; i += kWidth) store(partial + i, zero());
    int64_t row = block;
    for (; row + kGroup <= stop; row += kGroup) group(row, Constant<kGroup>{});
    for (; row < stop; ++row) group(row, Constant<int64_t{1}>{});
    for (int64_t i = 0; i < length; i += kWidth) add_to_double(totals + i, load(partial + i));
  }
}

constexpr int64_t kFetched = 8192;  // bytes of a group; the rows of a longer group lie in pages of their own

// Prefetches a share of the next group, in the order of memory, while column i of the group that begins at `first` is
// read. The hardware does not see that memory is read in sequence where rows of one page are read side by side. The
// function is always inlined: GCC takes a function that only prefetches for one without effect, and drops its calls.
template <class T>
__attribute__((always_inline)) inline void fetch_next_group(const T* first, int64_t period, int64_t i) {
  constexpr int64_t bytes = sizeof(T);
  if (kGroup * period * bytes > kFetched) return;
  const char* next = reinterpret_cast<const char*>(first) + kGroup * (period + i) * bytes;
  for (int64_t line = 0; line < kGroup * kWidth * bytes; line += 64) _mm_prefetch(next + line, _MM_HINT_T0);
}

template <class T>
void sample_columns(const SampleArgs& args) {
  const T* c = static_cast<const T*>(args.c);
  const float every = 1.0f / args.samples, inner = 1.0f / (args.samples - 2);
  for (int64_t i = 0; i < args.channels; i += kWidth) {
    const int64_t lanes = args.channels - i;
    Float sum = zero(), least = zero(), most = zero();
    for (int64_t s = 0; s < args.samples; ++s) {
      const Float v = load_lanes(c + args.rows[s] * args.channels + i, lanes);
      sum = sum + v;
      least = s == 0 ? v : smaller(least, v);
      most = s == 0 ? v : larger(most, v);
    }
    store_lanes(args.mean + i, args.samples < 3 ? sum * every : (sum - least - most) * inner, lanes);
  }
}

void sample_mean(const SampleArgs& args) {
  with(args.dtype, [&](auto t) { sample_columns<typename decltype(t)::type>(args); });
}

template <class T>
void stats_rows(const StatsArgs& args, int64_t begin, int64_t end) {
  const int64_t period = args.period;
  float *sum = args.partial, *squares = args.partial + period;
  const T* c = static_cast<const T*>(args.c);
  for_groups(args.partial, args.sums, 2 * period, begin, end, [&](int64_t row, auto rows) {
    const T* first = c + row * period;
    for (int64_t i = 0; i < period; i += kWidth) {
      const Float shift = load(args.shift + i);
      if constexpr (rows.value == kGroup) fetch_next_group(first, period, i);
      // a group is summed by itself first: its terms keep digits that the long sums would round off
      Float s = zero(), q = zero();
      for (int64_t r = 0; r < rows.value; ++r) {
        const Float d = load(first + r * period + i) - shift;
        s = r == 0 ? d : s + d;
        q = r == 0 ? d * d : fma(d, d, q);
      }
      store(sum + i, load(sum + i) + s);
      store(squares + i, load(squares + i) + q);
    }
  });
}

void bn_stats(const StatsArgs& args, int64_t begin, int64_t end) {
  with(args.dtype, [&](auto t) { stats_rows<typename decltype(t)::type>(args, begin, end); });
}

template <class T, Residual form, bool with_relu, bool with_mask>
void forward_rows(const ForwardArgs& args, int64_t begin, int64_t end) {
  const int64_t period = args.period;
  for (int64_t row = begin; row < end; ++row) {
    const T* c = static_cast<const T*>(args.c) + row * period;
    const T* residual = static_cast<const T*>(args.residual) + row * period;
    T* y = static_cast<T*>(args.y) + row * period;
    for (int64_t i = 0; i < period; i += kWidth) {
      Float z = fma(load(args.scale + i), load(c + i), load(args.shift + i));
      if constexpr (form == Residual::kIdentity) z = z + load(residual + i);
      if constexpr (form == Residual::kProjection) {
        z = z + fma(load(args.residual_scale + i), load(residual + i), load(args.residual_shift + i));
      }
      z = rounded<T>(z);
      if constexpr (with_mask) pack_bits(args.mask + (row * period + i) / 8, positive_or_nan(z));
      store(y + i, with_relu ? relu(z) : z);
    }
  }
}

void bn_add_relu_forward(const ForwardArgs& args, int64_t begin, int64_t end) {
  with(args.dtype, [&](auto t) {
    with(args.form, [&](auto form) {
      with(args.relu, [&](auto relu) {
        with(args.mask != nullptr, [&](auto mask) {
          forward_rows<typename decltype(t)::type, form.value, relu.value, mask.value>(args, begin, end);
        });
      });
    });
  });
}

// dz of kWidth elements. It is formed from dy, and from the mask or the rounded scale*c + shift.
template <class T, Gradient gradient, class Args>
inline Float gradient_at(const Args& args, const T* dy, Float c, int64_t row, int64_t i) {
  const Float d = load(dy + i);
  if constexpr (gradient == Gradient::kMask) {
    return select(unpack_bits(args.mask + (row * args.period + i) / 8), d);
  }
  if constexpr (gradient == Gradient::kSign) {
    return select(positive_or_nan(rounded<T>(fma(load(args.scale + i), c, load(args.shift + i)))), d);
  }
  return d;
}

template <class T, Gradient gradient, bool with_shortcut>
void backward_reduce_rows(const BackwardReduceArgs& args, int64_t begin, int64_t end) {
  const int64_t period = args.period;
  float *sum = args.partial, *centered = sum + period, *shortcut = sum + 2 * period;
  const int64_t length = (with_shortcut ? 3 : 2) * period;
  for_groups(args.partial, args.sums, length, begin, end, [&](int64_t first, auto rows) {
    for (int64_t i = 0; i < period; i += kWidth) {
      const Float mean = load(args.mean + i);
      Float s = load(sum + i), k = load(centered + i), h = zero();
      if constexpr (with_shortcut) {
        h = load(shortcut + i);
        if constexpr (rows.value == kGroup) {
          fetch_next_group(static_cast<const T*>(args.shortcut_c) + first * period, period, i);
        }
      }
      if constexpr (rows.value == kGroup) {
        fetch_next_group(static_cast<const T*>(args.c) + first * period, period, i);
        fetch_next_group(static_cast<const T*>(args.dy) + first * period, period, i);
      }
      for (int64_t row = first; row < first + rows.value; ++row) {
        const Float c = load(static_cast<const T*>(args.c) + row * period + i);
        const Float dz = gradient_at<T, gradient>(args, static_cast<const T*>(args.dy) + row * period, c, row, i);
        s = s + dz;
        k = fma(dz, c - mean, k);
        if constexpr (with_shortcut) {
          const Float c2 = load(static_cast<const T*>(args.shortcut_c) + row * period + i);
          h = fma(dz, c2 - load(args.shortcut_mean + i), h);
        }
      }
      store(sum + i, s);
      store(centered + i, k);
      if constexpr (with_shortcut) store(shortcut + i, h);
    }
  });
}

void bn_add_relu_backward_reduce(const BackwardReduceArgs& args, int64_t begin, int64_t end) {
  with(args.dtype, [&](auto t) {
    with(args.gradient, [&](auto gradient) {
      with(args.shortcut_c != nullptr, [&](auto shortcut) {
        backward_reduce_rows<typename decltype(t)::type, gradient.value, shortcut.value>(args, begin, end);
      });
    });
  });
}

template <bool frozen>
inline Float coefficients_at(const Coefficients& v, Float dz, Float c, int64_t i) {
  const Float a = load(v.A + i);
  return frozen ? a * dz : fma(a, dz, fma(load(v.B + i), c, load(v.K + i)));
}

enum class Second { kNone, kDz, kShortcut };  // what goes to dresidual

template <class T, Gradient gradient, Second second, bool frozen, bool frozen_shortcut>
void backward_input_rows(const BackwardInputArgs& args, int64_t begin, int64_t end) {
  const int64_t period = args.period;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * period;
    const T* dy = static_cast<const T*>(args.dy) + at;
    const T* c = static_cast<const T*>(args.c) + at;
    const T* shortcut_c = static_cast<const T*>(args.shortcut_c) + at;
    T* dc = static_cast<T*>(args.dc) + at;
    T* dresidual = static_cast<T*>(args.dresidual) + at;
    for (int64_t i = 0; i < period; i += kWidth) {
      const Float c_i = load(c + i);
      const Float dz = gradient_at<T, gradient>(args, dy, c_i, row, i);
      store(dc + i, rounded<T>(coefficients_at<frozen>(args.main, dz, c_i, i)));
      if constexpr (second == Second::kDz) store(dresidual + i, dz);
      if constexpr (second == Second::kShortcut) {
        const Float dc2 = coefficients_at<frozen_shortcut>(args.shortcut, dz, load(shortcut_c + i), i);
        store(dresidual + i, rounded<T>(dc2));
      }
    }
  }
}

template <class T, Gradient gradient, bool frozen>
void backward_input_second(const BackwardInputArgs& args, int64_t begin, int64_t end) {
  if (args.dresidual == nullptr) {
    return backward_input_rows<T, gradient, Second::kNone, frozen, false>(args, begin, end);
  }
  if (args.shortcut_c == nullptr) {
    return backward_input_rows<T, gradient, Second::kDz, frozen, false>(args, begin, end);
  }
  with(args.shortcut.B == nullptr, [&](auto frozen_shortcut) {
    backward_input_rows<T, gradient, Second::kShortcut, frozen, frozen_shortcut.value>(args, begin, end);
  });
}

void bn_add_relu_backward_input(const BackwardInputArgs& args, int64_t begin, int64_t end) {
  with(args.dtype, [&](auto t) {
    with(args.gradient, [&](auto gradient) {
      with(args.main.B == nullptr, [&](auto frozen) {
        backward_input_second<typename decltype(t)::type, gradient.value, frozen.value>(args, begin, end);
      });
    });
  });
}

void relu_backward(const MaskArgs& args, int64_t begin, int64_t end) {
  with(args.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    for (int64_t i = begin * args.period; i < end * args.period; i += kWidth) {
      const Float dz = select(unpack_bits(args.mask + i / 8), load(static_cast<const T*>(args.dy) + i));
      store(static_cast<T*>(args.dz) + i, dz);
    }
  });
}

}  // namespace
