// Chooses the kernels that this processor runs.
#include "kernels.h"

#include <cpuid.h>

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

constexpr unsigned kAmxBf16 = 1u << 22;  // of EDX, CPUID leaf 7

bool has_amx() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) != 0;
}

}  // namespace

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

const Convolutions* convolutions(Dtype dtype) {
  if (kernels() == nullptr) return nullptr;
  if (dtype == Dtype::kFloat32) return &kernels()->float32;
  static const bool bfloat16 = kernels() == &avx512_kernels && __builtin_cpu_supports("avx512bf16") && !has_amx();
  return bfloat16 ? &avx512_bf16_convolutions : nullptr;
}

}  // namespace fusedres::cpu
