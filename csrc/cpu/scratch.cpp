#include "scratch.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace fusedres::cpu {

namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr int kWindow = 1024;  // calls after which a thread gives back what none of them needed

class Kept {
 public:
  ~Kept() { release(); }

  float* at_least(size_t bytes) {
    largest_ = std::max(largest_, bytes);
    if (bytes > size_ || (++calls_ >= kWindow && size_ > 2 * largest_ + kHugePage)) take(largest_);
    if (calls_ >= kWindow) calls_ = 0, largest_ = bytes;
    return reinterpret_cast<float*>(data_);
  }

 private:
  void take(size_t bytes) {
    release();
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    mapped_ = static_cast<char*>(mapped);
    length_ = bytes + kHugePage;
    size_ = bytes;
    const auto address = reinterpret_cast<uintptr_t>(mapped_);
    data_ = mapped_ + ((address + kHugePage - 1) / kHugePage * kHugePage - address);
    madvise(data_, bytes, MADV_HUGEPAGE);  // advice only: without huge pages the memory is slower
  }

  void release() {
    if (mapped_ != nullptr) munmap(mapped_, length_);
    mapped_ = data_ = nullptr;
    size_ = 0;
  }

  char *mapped_ = nullptr, *data_ = nullptr;
  size_t length_ = 0, size_ = 0, largest_ = 0;
  int calls_ = 0;
};

thread_local Kept kept[2];

}  // namespace

float* scratch(Scratch use, int64_t floats) { return kept[int(use)].at_least(size_t(floats) * sizeof(float)); }

}  // namespace fusedres::cpu
