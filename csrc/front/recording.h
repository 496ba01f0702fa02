// The operations of a block's forward or backward, which fusedres/recording/ recorded once, to be run without Python:
// fusedres/recording/code.py writes what is read here.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "device_ops.h"
#include "forms.h"
#include "given.h"

namespace fusedres::front {

struct Allocate {
  Slot made;
  Form form;
};

// made: a tensor in base's storage, `offset` elements behind base's first one
struct View {
  Slot made, base;
  int64_t offset;
  std::vector<int64_t> sizes, strides;
};

// written = source, in written's dtype and strides
struct Copy {
  Slot written, source;
};

// made = left + right
struct Add {
  Slot made, left, right;
};

// What the schema says of a result. A number is thrown away: it is always the same one.
enum class Result : int64_t { kTensor, kOptionalTensor, kNumber };

// Of an operator of torch's dispatcher, or of an op of this library (`own`, else null). direct: runs the call past the
// dispatcher, else null, and gives false where this torch has no function for that. made: a slot for each of its
// results, which are tensors, kNone for absent ones.
struct Call {
  std::string name, overload;
  DirectOp own;
  bool (*direct)(const Call&, Slots&);
  std::vector<Argument> arguments;
  std::vector<std::pair<Slot, Result>> made;
};

enum class Word : int64_t { kPointer, kInt32, kInt64, kFloat };

// Of a kernel that Triton compiled and loaded. parameters: slots, or the bits of numbers.
struct Launch {
  void* function;
  uint32_t grid[3], threads, shared_bytes;
  std::vector<std::pair<Word, int64_t>> parameters;
};

// What is in the slots is read no more.
struct Free {
  std::vector<Slot> slots;
};

using Step = std::variant<Allocate, View, Copy, Add, Call, Launch, Free>;

// results: of the pass, in their order; outputs: those of them that a replay makes, once each.
struct Recording {
  int64_t slots;
  std::vector<Form> inputs;
  std::vector<Step> steps;
  std::vector<Slot> results, outputs;
};

// Throws where `code`, int64 on the CPU, is no recording. names: "namespace::op.overload" of each operator, one a line.
Recording read_recording(const torch::stable::Tensor& code, const std::string& names);

// Runs the recording of that number. The outputs; none where an input is of another form than the recorded one.
//
// bundle: of tensors that are inputs too, behind the others, or 0. With `keeps` the results behind the first are kept
// in a bundle, whose number comes with it. places: of the inputs behind the first, where they have to lie for that; or
// 0.
std::tuple<std::vector<torch::stable::Tensor>, int64_t> replay(int64_t number,
                                                               std::vector<torch::stable::Tensor> inputs,
                                                               int64_t bundle, bool keeps, int64_t places);

// Has `replay_failed_step` say that nothing has run yet, for whatever fails before `replay`.
void replay_begins();

void bundle_drop(int64_t number);

}  // namespace fusedres::front
