// Which instruction set this processor runs.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace fusedres::cpu {

namespace {

const Kernels* choose() {
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const bool avx2_only = limit != nullptr && std::strcmp(limit, "avx2") == 0;
  if (limit != nullptr && std::strcmp(limit, "default") == 0) return nullptr;
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return nullptr;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 && !avx2_only ? &avx512_kernels : &avx2_kernels;
}

}  // namespace

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

}  // namespace fusedres::cpu
