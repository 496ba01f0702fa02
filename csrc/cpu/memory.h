// Fresh memory for large outputs.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace fusedres::cpu {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kHugePageBytes = 2 * kHugePage;  // below this an aligned huge page may not fit

// Asks for huge pages under memory that is about to be written for the first time. The allocator returns large
// blocks to the system when they are freed, so every step faults them in again, at 4 KiB a time without this.
inline void advise_huge_pages(void* data, int64_t bytes) {
  if (bytes < kHugePageBytes) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  // a hint: where the kernel does not take it, nothing changes
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace fusedres::cpu
