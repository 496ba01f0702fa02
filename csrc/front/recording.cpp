#include "recording.h"

#include <sstream>
#include <stdexcept>

#include "torch_calls.h"

namespace fusedres::front {

namespace {

// The words of a recording, one after the other.
class Words {
 public:
  explicit Words(const torch::stable::Tensor& code)
      : next_(static_cast<const int64_t*>(code.const_data_ptr())), end_(next_ + code.numel()) {}

  bool is_empty() const { return next_ == end_; }

  int64_t number() {
    if (is_empty()) throw std::runtime_error("fusedres recording: the code ends early; record it again.");
    return *next_++;
  }

  int64_t count() {
    const int64_t n = number();
    if (n < 0 || n > end_ - next_) throw std::runtime_error("fusedres recording: the code is cut; record it again.");
    return n;
  }

  std::vector<int64_t> numbers() {
    const int64_t n = count();
    next_ += n;
    return {next_ - n, next_};
  }

  Form form() {
    Form f;
    f.dtype = int32_t(number());
    f.device = int32_t(number());
    f.device_index = int32_t(number());
    f.aligned = number() != 0;
    f.sizes = numbers();
    f.strides = numbers();
    return f;
  }

 private:
  const int64_t *next_, *end_;
};

constexpr char kOwn[] = "fusedres_native::";
constexpr char kDirect[] = "direct ";  // before an operator of torch_calls.h

// device: as find_op's
Call read_call(Words& words, const std::vector<std::string>& names, const char* device) {
  Call call{};
  std::string full = names.at(size_t(words.number()));
  const bool is_direct = full.rfind(kDirect, 0) == 0;
  if (is_direct) full.erase(0, sizeof kDirect - 1);
  const size_t dot = full.find('.');
  call.name = full.substr(0, dot);
  call.overload = dot == std::string::npos ? "" : full.substr(dot + 1);
  if (call.name.rfind(kOwn, 0) == 0) {
    call.own = find_op(device, call.name.substr(sizeof kOwn - 1));
    if (call.own == nullptr)
      throw std::runtime_error("fusedres recording: " + std::string(device) + " has no " + call.name + ".");
  }
  if (is_direct) call.direct = full == "aten::convolution" ? convolution : convolution_backward;
  for (int64_t n = words.count(); n > 0; --n) {
    Argument argument;
    argument.kind = Kind(words.number());
    argument.is_optional = words.number() != 0;
    const bool is_list = argument.kind >= Kind::kTensors;
    argument.value = is_list ? 0 : words.number();
    if (is_list) argument.values = words.numbers();
    call.arguments.push_back(std::move(argument));
  }
  for (int64_t n = words.count(); n > 0; --n) {
    const Slot slot = words.number();
    call.made.emplace_back(slot, Result(words.number()));
  }
  return call;
}

Launch read_launch(Words& words) {
  Launch launch;
  launch.function = reinterpret_cast<void*>(words.number());
  for (uint32_t& size : launch.grid) size = uint32_t(words.number());
  launch.threads = uint32_t(words.number());
  launch.shared_bytes = uint32_t(words.number());
  for (int64_t n = words.count(); n > 0; --n) {
    const Word word = Word(words.number());
    launch.parameters.emplace_back(word, words.number());
  }
  return launch;
}

enum Opcode : int64_t { kAllocate, kView, kCopy, kAdd, kCall, kLaunch, kFree };

Step read_step(Words& words, const std::vector<std::string>& names, const char* device) {
  const int64_t opcode = words.number();
  switch (opcode) {
    case kAllocate: {
      const Slot made = words.number();
      return Allocate{made, words.form()};
    }
    case kView: {
      View view{words.number(), words.number(), words.number(), {}, {}};
      view.sizes = words.numbers();
      view.strides = words.numbers();
      return view;
    }
    case kCopy: return Copy{words.number(), words.number()};
    case kAdd: return Add{words.number(), words.number(), words.number()};
    case kCall: return read_call(words, names, device);
    case kLaunch: return read_launch(words);
    case kFree: return Free{words.numbers()};
    default: throw std::runtime_error("fusedres recording: no step has the number " + std::to_string(opcode) + ".");
  }
}

}  // namespace

Recording read_recording(const torch::stable::Tensor& code, const std::string& names) {
  std::vector<std::string> operators;
  std::istringstream lines(names);
  for (std::string line; std::getline(lines, line);) operators.push_back(line);
  Words words(code);
  Recording recording;
  recording.slots = words.number();
  for (int64_t n = words.count(); n > 0; --n) recording.inputs.push_back(words.form());
  recording.results = words.numbers();
  recording.outputs = words.numbers();
  const bool on_cpu = recording.inputs.empty() || recording.inputs[0].device == aoti_torch_device_type_cpu();
  while (!words.is_empty()) recording.steps.push_back(read_step(words, operators, on_cpu ? "CPU" : "CUDA"));
  return recording;
}

}  // namespace fusedres::front
