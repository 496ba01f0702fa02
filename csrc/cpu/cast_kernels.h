// Values in another dtype. Included behind one of the vec_*.h.
#pragma once

#include "select.h"

namespace {

template <class From, class To>
void cast_values(const From* from, To* to, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, rounded<To>(load(from + i)));
  if (i == n) return;
  From last[kWidth] = {};
  To made[kWidth];
  __builtin_memcpy(last, from + i, size_t(n - i) * sizeof(From));
  store(made, rounded<To>(load(last)));
  __builtin_memcpy(to + i, made, size_t(n - i) * sizeof(To));
}

void cast(const CastArgs& args, int64_t begin, int64_t end) {
  with(args.from_dtype, [&](auto f) {
    with(args.to_dtype, [&](auto t) {
      using From = typename decltype(f)::type;
      using To = typename decltype(t)::type;
      cast_values(static_cast<const From*>(args.from) + begin, static_cast<To*>(args.to) + begin, end - begin);
    });
  });
}

}  // namespace
