// torch's operators that its C shim has, called by it: torch's dispatcher would box every argument, look the operator
// up by its name, and ask keys that a replay goes past.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <string>

#include "recording.h"

namespace fusedres::front {

// A function of one of torch's libraries; null where it has none, or is not loaded.
template <class Function>
Function of_torch(const char* library, const char* name) {
  void* loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return loaded == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(loaded, name));
}

// Fails with what torch said, where it tells that (from 2.13 on). step: what failed.
inline void check_torch(AOTITorchError error, const std::string& step) {
  if (error == AOTI_TORCH_SUCCESS) return;
  using What = const char* (*)();
  static const auto what = of_torch<What>("libtorch_cpu.so", "torch_exception_get_what_without_backtrace");
  const char* text = what == nullptr ? nullptr : what();
  throw std::runtime_error(text == nullptr ? "fusedres replay: " + step + " failed." : std::string(text));
}

// One function for each device; null where this torch has none.
template <class Function>
struct OfDevices {
  Function cpu, cuda;

  explicit OfDevices(const std::string& name)
      : cpu(of_torch<Function>("libtorch_cpu.so", ("aoti_torch_cpu_" + name).c_str())),
        cuda(of_torch<Function>("libtorch_cuda.so", ("aoti_torch_cuda_" + name).c_str())) {}

  Function of(const torch::stable::Tensor& t) const { return t.is_cpu() ? cpu : cuda; }
};

// The numbers of a convolution, which stand in the same order in all of its operators.
struct Geometry {
  const std::vector<int64_t>&stride, &padding, &dilation, &output_padding;
  bool is_transposed;
  int64_t groups;

  // first: the place of the stride
  Geometry(const std::vector<Argument>& arguments, size_t first)
      : stride(arguments.at(first).values),
        padding(arguments.at(first + 1).values),
        dilation(arguments.at(first + 2).values),
        output_padding(arguments.at(first + 4).values),
        is_transposed(arguments.at(first + 3).value != 0),
        groups(arguments.at(first + 5).value) {}
};

// Null where an argument that may be a tensor is none.
inline AtenTensorHandle handle_of(const Argument& argument, const Slots& slots) {
  return argument.kind == Kind::kNone ? nullptr : slots.at(size_t(argument.value))->get();
}

// aten::convolution; false where torch's shim has none.
inline bool convolution(const Call& call, Slots& slots) {
  using Function = AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, const int64_t*, int64_t,
                                      const int64_t*, int64_t, const int64_t*, int64_t, int32_t, const int64_t*,
                                      int64_t, int64_t, AtenTensorHandle*);
  static const OfDevices<Function> found("convolution");
  const auto& given = call.arguments;
  const Function function = found.of(*slots.at(size_t(given.at(0).value)));
  if (function == nullptr) return false;
  const Geometry g(given, 3);
  AtenTensorHandle bias = handle_of(given[2], slots), made;
  check_torch(function(handle_of(given[0], slots), handle_of(given[1], slots), bias == nullptr ? nullptr : &bias,
                       g.stride.data(), int64_t(g.stride.size()), g.padding.data(), int64_t(g.padding.size()),
                       g.dilation.data(), int64_t(g.dilation.size()), g.is_transposed, g.output_padding.data(),
                       int64_t(g.output_padding.size()), g.groups, &made),
              call.name);
  slots.at(size_t(call.made.at(0).first)) = torch::stable::Tensor(made);
  return true;
}

// aten::convolution_backward; false where torch's shim has none.
inline bool convolution_backward(const Call& call, Slots& slots) {
  using Function =
      AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, const int64_t**, int64_t, const int64_t*,
                         int64_t, const int64_t*, int64_t, const int64_t*, int64_t, int32_t, const int64_t*, int64_t,
                         int64_t, const int32_t*, int64_t, AtenTensorHandle*, AtenTensorHandle*, AtenTensorHandle*);
  static const OfDevices<Function> found("convolution_backward");
  const auto& given = call.arguments;
  const Function function = found.of(*slots.at(size_t(given.at(0).value)));
  if (function == nullptr) return false;
  const Geometry g(given, 4);
  const std::vector<int64_t>& sizes = given[3].values;
  const int64_t* bias_sizes = sizes.data();
  const std::vector<int64_t>& wanted = given.at(10).values;
  std::array<int32_t, 3> mask;
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = int32_t(wanted.at(i));
  std::array<AtenTensorHandle, 3> made;
  check_torch(
      function(handle_of(given[0], slots), handle_of(given[1], slots), handle_of(given[2], slots),
               given[3].kind == Kind::kNone ? nullptr : &bias_sizes, int64_t(sizes.size()), g.stride.data(),
               int64_t(g.stride.size()), g.padding.data(), int64_t(g.padding.size()), g.dilation.data(),
               int64_t(g.dilation.size()), g.is_transposed, g.output_padding.data(), int64_t(g.output_padding.size()),
               g.groups, mask.data(), int64_t(mask.size()), &made[0], &made[1], &made[2]),
      call.name);
  for (size_t i = 0; i < made.size(); ++i) {
    torch::stable::Tensor gradient(made[i]);  // without a tensor where none is wanted
    const Slot slot = call.made.at(i).first;
    if (slot != kNone) slots.at(size_t(slot)) = std::move(gradient);
  }
  return true;
}

}  // namespace fusedres::front
