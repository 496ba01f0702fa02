// Chooses the kernels that this processor runs.
#include "kernels.h"

#include <cpuid.h>
#include <strings.h>

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace fusedres::cpu {

namespace {

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

const Kernels* choose() {
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const bool avx2_only = limit != nullptr && std::strcmp(limit, "avx2") == 0;
  if (limit != nullptr && std::strcmp(limit, "default") == 0) return nullptr;
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return nullptr;
  return has_avx512() && !avx2_only ? &avx512_kernels : &avx2_kernels;
}

// Whether oneDNN is told to use no more than AVX2. It takes the limit from either variable, in any case of letters.
bool library_stays_below_avx512() {
  for (const char* variable : {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}) {
    const char* limit = std::getenv(variable);
    if (limit == nullptr) continue;
    for (const char* narrow : {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2"}) {
      if (strcasecmp(limit, narrow) == 0) return true;
    }
    return false;
  }
  return false;
}

constexpr unsigned kZen4 = 0x19;  // family, also of Zen 3, which has no AVX-512

// Whether vectors of AVX-512 are multiplied in two halves, so that those of AVX2 are as fast: on Zen 4.
bool multiplies_halves() {
  unsigned a, b, c, d;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  return (a >> 8 & 0xf) + (a >> 20 & 0xff) == kZen4;
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

bool library_is_wider() {
  static const bool wider =
      kernels() == &avx2_kernels && has_avx512() && !multiplies_halves() && !library_stays_below_avx512();
  return wider;
}

const Convolutions* convolutions(Dtype dtype) {
  if (kernels() == nullptr) return nullptr;
  if (dtype == Dtype::kFloat32) return &kernels()->float32;
  static const bool bfloat16 = kernels() == &avx512_kernels && __builtin_cpu_supports("avx512bf16") && !has_amx();
  return bfloat16 ? &avx512_bf16_convolutions : nullptr;
}

}  // namespace fusedres::cpu
