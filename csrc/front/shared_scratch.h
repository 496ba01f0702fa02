// Scratch of the launches of one replay, which come one after the other on one stream: what one of them leaves at zero
// the next one does not clear.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace fusedres::front {

// Within its scope, in this thread, `current` is it.
class SharedScratch {
 public:
  SharedScratch() : outer_(current_) { current_ = this; }
  SharedScratch(const SharedScratch&) = delete;
  SharedScratch& operator=(const SharedScratch&) = delete;
  ~SharedScratch() { current_ = outer_; }

  // Null outside of a replay.
  static SharedScratch* current() { return current_; }

  std::optional<torch::stable::Tensor> memory;  // bytes
  int64_t zero_bytes = 0;                       // its first ones

 private:
  SharedScratch* outer_;
  static inline thread_local SharedScratch* current_ = nullptr;
};

}  // namespace fusedres::front
