// The arguments of a recorded call.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <vector>

namespace fusedres::front {

// A slot holds a tensor; inputs have the first slots.
using Slot = int64_t;
constexpr Slot kNone = -1;
using Slots = std::vector<std::optional<torch::stable::Tensor>>;

enum class Kind : int64_t { kNone, kTensor, kInt, kBool, kFloat, kTensors, kInts, kBools, kFloats };

// value, values: slots, numbers, or the bits of doubles; is_optional: the schema's type ends in "?".
struct Argument {
  Kind kind;
  bool is_optional;
  int64_t value;
  std::vector<int64_t> values;
};

inline double double_of(int64_t bits) {
  double number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

// An op's arguments by their places, in the types that its function takes.
class Given {
 public:
  Given(const std::vector<Argument>& arguments, const Slots& slots) : arguments_(arguments), slots_(slots) {}

  template <class T>
  T get(size_t place) const {
    return of(place, static_cast<T*>(nullptr));
  }

 private:
  using Tensor = torch::stable::Tensor;

  const Argument& at(size_t place, Kind kind) const {
    const Argument& argument = arguments_.at(place);
    if (argument.kind != kind) throw std::runtime_error("fusedres replay: an argument of another kind.");
    return argument;
  }
  const Tensor& in(Slot slot) const { return *slots_[size_t(slot)]; }

  Tensor of(size_t place, Tensor*) const { return in(at(place, Kind::kTensor).value); }
  std::optional<Tensor> of(size_t place, std::optional<Tensor>*) const {
    if (arguments_.at(place).kind == Kind::kNone) return std::nullopt;
    return in(at(place, Kind::kTensor).value);
  }
  int64_t of(size_t place, int64_t*) const { return at(place, Kind::kInt).value; }
  bool of(size_t place, bool*) const { return at(place, Kind::kBool).value != 0; }
  double of(size_t place, double*) const { return double_of(at(place, Kind::kFloat).value); }
  std::vector<Tensor> of(size_t place, std::vector<Tensor>*) const {
    std::vector<Tensor> tensors;
    for (const Slot slot : at(place, Kind::kTensors).values) tensors.push_back(in(slot));
    return tensors;
  }
  std::vector<double> of(size_t place, std::vector<double>*) const {
    std::vector<double> numbers;
    for (const int64_t bits : at(place, Kind::kFloats).values) numbers.push_back(double_of(bits));
    return numbers;
  }

  const std::vector<Argument>& arguments_;
  const Slots& slots_;
};

}  // namespace fusedres::front
