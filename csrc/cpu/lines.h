// Arrays that begin at a cache line. A vector that lies across two lines costs as much as two vectors, and more where
// it is loaded soon after it was stored.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

namespace fusedres::cpu {

constexpr int64_t kLineBytes = 64;

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An odd number of cache lines: planes and rows that lie a power of two apart would share a few lines of the caches.
inline int64_t odd_lines(int64_t floats) { return (divided_up(floats, 16) | 1) * 16; }

template <class T>
class Lines {
 public:
  Lines() = default;
  // The elements are uninitialised.
  explicit Lines(int64_t size) : size_(size), memory_(new char[size * sizeof(T) + kLineBytes]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T*>((address + kLineBytes - 1) / kLineBytes * kLineBytes);
  }
  Lines(int64_t size, T value) : Lines(size) { std::fill_n(data_, size, value); }

  int64_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t size_ = 0;
  std::unique_ptr<char[]> memory_;
  T* data_ = nullptr;
};

}  // namespace fusedres::cpu
