// What becomes of the sums of a 1x1 convolution's product before they are stored. Included after vec_avx2.h or
// vec_avx512.h.
#pragma once

#include "kernels.h"
#include "words.h"

namespace {

using namespace fusedres::cpu;

// A part of the depth of a product. Sums of all parts but the last are kept where the result will lie.
struct Part {
  bool first, last;
};

// Stores a whole result. past_caches: to memory itself.
template <bool past_caches, class T>
FUSEDRES_INLINE void store_result(T* p, Float v, int64_t lanes) {
  if constexpr (past_caches) return store_past_caches(p, v);
  store_lanes(p, v, lanes);
}

// Stores the sums as they are, or added to the shortcut's gradient.
template <class T, bool past_caches>
struct AddToShortcut {
  T* result;
  const T* shortcut_dy = nullptr;  // like result, or null
  const uint8_t* mask = nullptr;   // one bit an element of shortcut_dy, or null

  // What is read before the result is written; null: nothing.
  const T* soon() const { return shortcut_dy != nullptr ? shortcut_dy : past_caches ? nullptr : result; }
  FUSEDRES_INLINE void operator()(Part part, int64_t element, int64_t, Float sum, int64_t lanes) const {
    const Float v = rounded<T>(sum + before(part, element, lanes));
    if (!part.last) return store_lanes(result + element, v, lanes);
    store_result<past_caches>(result + element, v, lanes);
  }

 private:
  Float before(Part part, int64_t element, int64_t lanes) const {
    if (!part.first) return load_lanes(result + element, lanes);
    if (shortcut_dy == nullptr) return zero();
    const Float v = load_lanes(shortcut_dy + element, lanes);
    return mask == nullptr ? v : select(unpack_bits_lanes(mask + element / 8, lanes), v);
  }
};

// Stores relu(scale*sum + shift + residual), once the sum is whole.
template <class T, Residual form, bool with_relu, bool past_caches>
struct ScaleShiftAddRelu {
  explicit ScaleShiftAddRelu(const Conv1x1Args& args)
      : args(args), residual(static_cast<const T*>(args.residual)), y(static_cast<T*>(args.y)) {}

  // What is read before y is written; null: nothing.
  const T* soon() const { return form != Residual::kNone ? residual : past_caches ? nullptr : y; }
  FUSEDRES_INLINE void operator()(Part part, int64_t element, int64_t channel, Float sum, int64_t lanes) const {
    if (!part.first) sum = sum + load_lanes(y + element, lanes);
    if (!part.last) return store_lanes(y + element, rounded<T>(sum), lanes);
    Float z = fma(load_lanes(args.scale + channel, lanes), sum, load_lanes(args.shift + channel, lanes));
    if constexpr (form == Residual::kIdentity) z = z + load_lanes(residual + element, lanes);
    if constexpr (form == Residual::kProjection) {
      const Float scale = load_lanes(args.residual_scale + channel, lanes);
      z = z + fma(scale, load_lanes(residual + element, lanes), load_lanes(args.residual_shift + channel, lanes));
    }
    z = rounded<T>(z);
    if constexpr (with_relu) z = relu(z);
    store_result<past_caches>(y + element, z, lanes);
  }

 private:
  const Conv1x1Args& args;
  const T* residual;
  T* y;
};

}  // namespace
