// What the launchers share: periods, repeated vectors, the tail of a tensor that fills no period, threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "launch.h"
#include "lines.h"

namespace fusedres::cpu {

constexpr int64_t kShortestPeriod = 128;       // elements; the start of a shorter inner loop costs more than the loop
constexpr int64_t kElementsPerThread = 32768;  // below this a second thread costs more than it brings

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// The flat array of rows x channels as `rows` periods of `length` elements and a `tail` shorter than a period.
struct Period {
  Period(const Shape& shape) : channels(shape.channels), element(size_of(shape.dtype)) {
    const int64_t unit = std::lcm(channels, kernels()->width);
    length = (kShortestPeriod + unit - 1) / unit * unit;
    rows = shape.rows * channels / length;
    tail = shape.rows * channels % length;
  }

  // [channels] -> [length]; null stays null
  Lines<float> repeat(const float* vector) const {
    if (vector == nullptr) return {};
    Lines<float> repeated(length);
    for (int64_t i = 0; i < length; i += channels) {
      std::memcpy(repeated.data() + i, vector, channels * sizeof(float));
    }
    return repeated;
  }

  int64_t channels, element, length, rows, tail;
};

// The tail as one full period. Inputs are copied and padded with zeros; copy_back writes the outputs to their tensors.
class Tail {
 public:
  explicit Tail(const Period& period) : period_(period), offset_(period.rows * period.length) {}

  const void* in(const void* tensor) {
    return padded(tensor, offset_ * period_.element, period_.tail * period_.element, period_.length * period_.element);
  }
  const uint8_t* in_mask(const uint8_t* mask) {
    return static_cast<const uint8_t*>(padded(mask, offset_ / 8, (period_.tail + 7) / 8, period_.length / 8));
  }
  void* out(void* tensor) {
    void* copy = const_cast<void*>(in(tensor));
    if (copy != nullptr) {
      outputs_.push_back(
          {static_cast<char*>(tensor) + offset_ * period_.element, copy, size_t(period_.tail * period_.element)});
    }
    return copy;
  }
  uint8_t* out_mask(uint8_t* mask) {
    uint8_t* copy = const_cast<uint8_t*>(in_mask(mask));
    if (copy != nullptr) {
      outputs_.push_back({mask + offset_ / 8, copy, size_t((period_.tail + 7) / 8)});
      if (period_.tail % 8 != 0) last_mask_byte_ = mask + (offset_ + period_.tail) / 8;
    }
    return copy;
  }
  void copy_back() const {
    for (const Output& output : outputs_) std::memcpy(output.target, output.copy, output.bytes);
    // the mask's last byte has bits of the padding: they become 0
    if (last_mask_byte_ != nullptr) *last_mask_byte_ &= uint8_t((1u << period_.tail % 8) - 1);
  }

 private:
  struct Output {
    void* target;
    const void* copy;
    size_t bytes;
  };

  void* padded(const void* tensor, int64_t offset, int64_t bytes, int64_t length) {
    if (tensor == nullptr) return nullptr;
    buffers_.emplace_back(length, 0);
    std::memcpy(buffers_.back().data(), static_cast<const char*>(tensor) + offset, bytes);
    return buffers_.back().data();
  }

  Period period_;
  int64_t offset_;
  std::vector<std::vector<char>> buffers_;
  std::vector<Output> outputs_;
  uint8_t* last_mask_byte_ = nullptr;
};

// How many pieces `rows` of `elements` each are cut into. The number depends on the sizes and on how many threads there
// are, and on nothing else.
inline int64_t count_chunks(int64_t rows, int64_t elements) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min({threads, rows, rows * elements / kElementsPerThread}));
}

// Calls body(chunk, begin, end) for each of `chunks` equal pieces of [0, rows), in parallel.
template <class F>
void parallel_chunks(int64_t chunks, int64_t rows, F body) {
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      body(chunk, rows * chunk / chunks, rows * (chunk + 1) / chunks);
    }
  });
}

// Sums in double [count, length] for each chunk, and as much float scratch.
class PartialSums {
 public:
  PartialSums(int64_t chunks, int64_t count, int64_t length)
      : chunks_(chunks), count_(count), length_(length), sums_(chunks * count * length, 0.0), scratch_(sums_.size()) {}

  double* sums(int64_t chunk) { return sums_.data() + chunk * count_ * length_; }
  float* scratch(int64_t chunk) { return scratch_.data() + chunk * count_ * length_; }

  // The total of sum `index` for one channel, over the chunks and then over the repetitions, always in this order.
  double total(int64_t index, int64_t channel, int64_t channels) const {
    double total = 0;
    for (int64_t i = channel; i < length_; i += channels) {
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) total += sums_[(chunk * count_ + index) * length_ + i];
    }
    return total;
  }

 private:
  int64_t chunks_, count_, length_;
  Lines<double> sums_;
  Lines<float> scratch_;
};

}  // namespace fusedres::cpu
