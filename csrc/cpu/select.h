// From run-time options to template arguments: `with(flag, [&](auto f) { kernel<f.value>(); })`.
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
    case Residual::none:
      return f(Constant<Residual::none>{});
    case Residual::identity:
      return f(Constant<Residual::identity>{});
    case Residual::projection:
      return f(Constant<Residual::projection>{});
  }
}

template <class F>
inline void with(fusedres::cpu::Gradient gradient, F f) {
  using fusedres::cpu::Gradient;
  switch (gradient) {
    case Gradient::plain:
      return f(Constant<Gradient::plain>{});
    case Gradient::mask:
      return f(Constant<Gradient::mask>{});
    case Gradient::sign:
      return f(Constant<Gradient::sign>{});
  }
}

template <class F>
inline void with(fusedres::cpu::Dtype dtype, F f) {
  dtype == fusedres::cpu::Dtype::float32 ? f(Type<float>{}) : f(Type<BFloat16>{});
}

}  // namespace
