// Runs a recording: every operator through torch's dispatcher, every Triton kernel through the driver.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>

#include "current_stream.h"
#include "places.h"
#include "recording.h"
#include "shared_scratch.h"
#include "store.h"
#include "torch_calls.h"

namespace fusedres::front {

namespace {

using torch::stable::Tensor;

constexpr size_t kMostFlags = 8;
using torch::stable::detail::from;
using torch::stable::detail::to;

// The driver's function, of the library that Triton loaded.
using LaunchKernel = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                             void**);
using ErrorString = int (*)(int, const char**);

template <class Function>
Function of_driver(const char* name) {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = driver == nullptr ? nullptr : dlsym(driver, name);
  if (symbol == nullptr) throw std::runtime_error(std::string("fusedres replay: libcuda.so.1 has no ") + name + ".");
  return reinterpret_cast<Function>(symbol);
}

void check_launched(int error) {
  if (error == 0) return;
  const char* text = nullptr;
  of_driver<ErrorString>("cuGetErrorString")(error, &text);
  throw std::runtime_error(std::string("CUDA error: ") + (text == nullptr ? "unknown" : text));
}

// One run of a recording: the tensors, as they come and go.
class Run {
 public:
  Run(const Recording& recording, std::vector<Tensor> inputs) : slots_(size_t(recording.slots)) {
    for (size_t i = 0; i < inputs.size(); ++i) slots_[i] = std::move(inputs[i]);
  }

  const Tensor& at(Slot slot) const { return *slots_[size_t(slot)]; }

  void operator()(const Allocate& step) {
    const Form& f = step.form;
    AtenTensorHandle made;
    check_torch(aoti_torch_empty_strided(int64_t(f.sizes.size()), f.sizes.data(), f.strides.data(), f.dtype, f.device,
                                         f.device_index, &made),
                "aten::empty_strided");
    put(step.made, Tensor(made));
  }

  void operator()(const View& step) {
    const Tensor& base = at(step.base);
    AtenTensorHandle made;
    check_torch(aoti_torch__reinterpret_tensor(base.get(), int64_t(step.sizes.size()), step.sizes.data(),
                                               step.strides.data(), step.offset, &made),
                "aten::as_strided");
    put(step.made, Tensor(made));
  }

  void operator()(const Copy& step) {
    check_torch(aoti_torch_copy_(at(step.written).get(), at(step.source).get(), 0), "aten::copy_");
  }

  // torch_call_dispatcher knows no Scalar, which aten::add takes.
  void operator()(const Add& step) {
    using AddTensor = AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, double, AtenTensorHandle*);
    static const OfDevices<AddTensor> found("add_Tensor");
    const AddTensor add = found.of(at(step.left));
    if (add == nullptr) throw std::runtime_error("fusedres replay: this torch has no aoti_torch_*_add_Tensor.");
    AtenTensorHandle made;
    check_torch(add(at(step.left).get(), at(step.right).get(), 1.0, &made), "aten::add");
    put(step.made, Tensor(made));
  }

  void operator()(const Call& step) {
    if (step.own != nullptr) return call_own(step);
    if (step.direct != nullptr && step.direct(step, slots_)) return;
    stack_.assign(std::max(step.arguments.size(), step.made.size()), 0);
    for (size_t i = 0; i < step.arguments.size(); ++i) stack_[i] = value_of(step.arguments[i]);
    check_torch(torch_call_dispatcher(step.name.c_str(), step.overload.c_str(), stack_.data(), TORCH_ABI_VERSION),
                step.name);
    for (size_t i = 0; i < step.made.size(); ++i) {
      const auto& [slot, result] = step.made[i];
      if (result == Result::kTensor) {
        put(slot, to<Tensor>(stack_[i]));
      } else if (result == Result::kOptionalTensor) {
        if (std::optional<Tensor> made = to<std::optional<Tensor>>(stack_[i])) put(slot, std::move(*made));
      }
    }
  }

  void operator()(const Launch& step) {
    static const LaunchKernel launch = of_driver<LaunchKernel>("cuLaunchKernel");
    // behind its own parameters a kernel of Triton's takes the addresses of two scratches, which are empty
    const size_t n = step.parameters.size();
    words_.assign(n + 2, 0);
    addresses_.resize(n + 2);
    void* stream = nullptr;
    for (size_t i = 0; i < n; ++i) {
      const auto& [word, value] = step.parameters[i];
      words_[i] = value;
      if (word == Word::kPointer) {
        const Tensor& t = at(value);
        words_[i] = int64_t(reinterpret_cast<uintptr_t>(t.const_data_ptr()));
        if (stream == nullptr) stream = current_stream(t);
      }
    }
    for (size_t i = 0; i < n + 2; ++i) addresses_[i] = &words_[i];
    check_launched(launch(step.function, step.grid[0], step.grid[1], step.grid[2], step.threads, 1, 1,
                          step.shared_bytes, stream, addresses_.data(), nullptr));
  }

  void operator()(const Free& step) {
    for (const Slot slot : step.slots) slots_[size_t(slot)].reset();
  }

 private:
  void put(Slot slot, Tensor made) {
    if (slot != kNone) slots_[size_t(slot)] = std::move(made);
  }

  void call_own(const Call& step) {
    results_.clear();
    step.own(Given(step.arguments, slots_), results_);
    for (size_t i = 0; i < step.made.size(); ++i) {
      if (results_.at(i)) put(step.made[i].first, std::move(*results_[i]));
    }
  }

  template <class T>
  static StableIValue wrapped(bool is_optional, T value) {
    return is_optional ? from(std::optional<T>(std::move(value))) : from(std::move(value));
  }

  StableIValue value_of(const Argument& argument) const {
    const bool optional = argument.is_optional;
    switch (argument.kind) {
      case Kind::kNone: return from(std::nullopt);
      case Kind::kTensor: return wrapped(optional, at(argument.value));
      case Kind::kInt: return wrapped(optional, argument.value);
      case Kind::kBool: return wrapped(optional, argument.value != 0);
      case Kind::kFloat: return wrapped(optional, double_of(argument.value));
      case Kind::kTensors: {
        std::vector<Tensor> tensors;
        for (const Slot slot : argument.values) tensors.push_back(at(slot));
        return wrapped(optional, std::move(tensors));
      }
      case Kind::kFloats: {
        std::vector<double> numbers;
        for (const int64_t bits : argument.values) numbers.push_back(double_of(bits));
        return wrapped(optional, std::move(numbers));
      }
      case Kind::kInts: return wrapped(optional, argument.values);
      case Kind::kBools: {
        std::array<bool, kMostFlags> flags;  // the bits of a std::vector<bool> have no address
        const size_t n = argument.values.size();
        if (n > flags.size()) throw std::runtime_error("fusedres replay: a list of more than 8 flags.");
        std::copy(argument.values.begin(), argument.values.end(), flags.begin());
        return wrapped(optional, torch::headeronly::HeaderOnlyArrayRef<bool>(flags.data(), n));
      }
    }
    throw std::runtime_error("fusedres replay: an argument of no known kind.");
  }

  Slots slots_, results_;
  std::vector<StableIValue> stack_;
  std::vector<int64_t> words_;
  std::vector<void*> addresses_;
};

Store<Recording>& store() {
  static auto* found = new Store<Recording>("recording");
  return *found;
}

// What a replay made for another one, which only that one reads.
Store<std::vector<Tensor>>& bundles() {
  static auto* found = new Store<std::vector<Tensor>>("bundle");
  return *found;
}

thread_local int64_t failed_step = 0;

int64_t recording_add(Tensor code, std::string names) { return store().add(read_recording(code, names)); }

void recording_drop(int64_t number) { store().drop(number); }

// The step at which this thread's last replay failed.
int64_t replay_failed_step() { return failed_step; }

bool all_match(const std::vector<Form>& forms, const std::vector<Tensor>& tensors) {
  if (tensors.size() != forms.size()) return false;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!matches(forms[i], tensors[i])) return false;
  }
  return true;
}

}  // namespace

void replay_begins() { failed_step = 0; }

std::tuple<std::vector<Tensor>, int64_t> replay(int64_t number, std::vector<Tensor> inputs, int64_t bundle, bool keeps,
                                                int64_t places) {
  replay_begins();
  if (places != 0 && !lie_at(places, inputs, 1)) return {std::vector<Tensor>(), 0};
  const std::shared_ptr<const Recording> recording = store().at(number);
  if (bundle != 0) {
    const auto kept = bundles().at(bundle);
    inputs.insert(inputs.end(), kept->begin(), kept->end());
  }
  if (!all_match(recording->inputs, inputs)) return {std::vector<Tensor>(), 0};
  const SharedScratch scratch;
  Run run(*recording, std::move(inputs));
  for (const Step& step : recording->steps) {
    std::visit(run, step);
    ++failed_step;
  }
  std::vector<Tensor> outputs, kept;
  for (const Slot slot : keeps ? recording->results : recording->outputs) {
    if (slot != kNone) (keeps && !outputs.empty() ? kept : outputs).push_back(run.at(slot));
  }
  return {std::move(outputs), keeps ? bundles().add(std::move(kept)) : 0};
}

namespace {

std::tuple<std::vector<Tensor>, int64_t> replay_anywhere(int64_t number, std::vector<Tensor> inputs, int64_t bundle,
                                                         bool keeps) {
  return replay(number, std::move(inputs), bundle, keeps, 0);
}

std::vector<Tensor> bundle_tensors(int64_t number) { return *bundles().at(number); }

}  // namespace

void bundle_drop(int64_t number) { bundles().drop(number); }

}  // namespace fusedres::front

STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CompositeExplicitAutograd, m) {
  using namespace fusedres::front;
  m.impl("recording_add", TORCH_BOX(&recording_add));
  m.impl("replay", TORCH_BOX(&replay_anywhere));
  m.impl("recording_drop", TORCH_BOX(&recording_drop));
  m.impl("replay_failed_step", TORCH_BOX(&replay_failed_step));
  m.impl("bundle_tensors", TORCH_BOX(&bundle_tensors));
  m.impl("bundle_drop", TORCH_BOX(&bundle_drop));
}
