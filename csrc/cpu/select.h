// Turns run-time options into template arguments: `with(flag, [&](auto f) { kernel<f.value>(); })`.
#pragma once

#include "kernels.h"

namespace {

template <auto V>
struct Constant {
  static constexpr auto value = V;
};

template <class T>
struct Type {
  using type = T;
};

template <class F>
inline void with(bool flag, F f) {
  flag ? f(Constant<true>{}) : f(Constant<false>{});
}

template <class F>
inline void with(fusedres::cpu::Residual form, F f) {
  using fusedres::cpu::Residual;
  switch (form) {
    case Residual::kNone: return f(Constant<Residual::kNone>{});
    case Residual::kIdentity: return f(Constant<Residual::kIdentity>{});
    case Residual::kProjection: return f(Constant<Residual::kProjection>{});
  }
}

template <class F>
inline void with(fusedres::cpu::Gradient gradient, F f) {
  using fusedres::cpu::Gradient;
  switch (gradient) {
    case Gradient::kPlain: return f(Constant<Gradient::kPlain>{});
    case Gradient::kMask: return f(Constant<Gradient::kMask>{});
    case Gradient::kSign: return f(Constant<Gradient::kSign>{});
  }
}

template <class F>
inline void with(fusedres::cpu::Dtype dtype, F f) {
  dtype == fusedres::cpu::Dtype::kFloat32 ? f(Type<float>{}) : f(Type<BFloat16>{});
}

}  // namespace
