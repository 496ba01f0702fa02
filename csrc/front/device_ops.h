// Registers the ops of a device with torch, and keeps them where a replay finds them: it calls them without torch's
// dispatcher, which up to 2.13 mixes up the types of results of which some are optional.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace fusedres::front {

using BoxedOp = void (*)(StableIValue*, uint64_t, uint64_t);

// device: "CPU" or "CUDA"; found again by find_op. Null where the device has no such op.
void keep_op(const std::string& device, const std::string& name, BoxedOp op);
BoxedOp find_op(const std::string& device, const std::string& name);

class DeviceOps {
 public:
  DeviceOps(torch::stable::detail::StableLibrary& library, const char* device) : library_(library), device_(device) {}

  void impl(const char* name, BoxedOp op) {
    library_.impl(name, op);
    keep_op(device_, name, op);
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
