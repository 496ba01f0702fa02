// Registers the ops of a device with torch, and keeps them where a replay finds them: it calls them without torch's
// dispatcher, which boxes every tensor, and up to 2.13 mixes up the types of results of which some are optional.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "given.h"

namespace fusedres::front {

// An op of this library on arguments that a recording has. Of its results those that are no tensors are left out.
using DirectOp = void (*)(const Given& arguments, Slots& results);

template <auto function>
struct Direct;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Direct<function> {
  static void call(const Given& arguments, Slots& results) {
    call(arguments, results, std::index_sequence_for<Arguments...>());
  }

 private:
  template <size_t... places>
  static void call(const Given& arguments, Slots& results, std::index_sequence<places...>) {
    if constexpr (std::is_void_v<Result>) {
      function(arguments.get<Arguments>(places)...);
    } else {
      put(function(arguments.get<Arguments>(places)...), results);
    }
  }

  static void put(bool, Slots& results) { results.emplace_back(); }
  static void put(torch::stable::Tensor made, Slots& results) { results.emplace_back(std::move(made)); }
  static void put(std::optional<torch::stable::Tensor> made, Slots& results) { results.push_back(std::move(made)); }
  template <class... Each>
  static void put(std::tuple<Each...> made, Slots& results) {
    std::apply([&](Each&... each) { (put(std::move(each), results), ...); }, made);
  }
};

// device: "CPU" or "CUDA"; found again by find_op. Null where the device has no such op.
void keep_op(const std::string& device, const std::string& name, DirectOp op);
DirectOp find_op(const std::string& device, const std::string& name);

class DeviceOps {
 public:
  DeviceOps(torch::stable::detail::StableLibrary& library, const char* device) : library_(library), device_(device) {}

  template <auto function>
  void impl(const char* name) {
    library_.impl(name, TORCH_BOX(function));
    keep_op(device_, name, Direct<function>::call);
  }

 private:
  torch::stable::detail::StableLibrary& library_;
  const char* device_;
};

}  // namespace fusedres::front

// As STABLE_TORCH_LIBRARY_IMPL(fusedres_native, device, m), with m a DeviceOps.
#define FUSEDRES_OPS(device, m)                                          \
  static void device##_ops(fusedres::front::DeviceOps& m);               \
  STABLE_TORCH_LIBRARY_IMPL(fusedres_native, device, device##_library) { \
    fusedres::front::DeviceOps ops(device##_library, #device);           \
    device##_ops(ops);                                                   \
  }                                                                      \
  static void device##_ops(fusedres::front::DeviceOps& m)
