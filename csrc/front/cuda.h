// CUDA as a device of the front: what it asks of tensors, and its launchers.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <optional>

#include "../cuda/launchers.h"
#include "arguments.h"

namespace fusedres::front {

// Within its scope the device of `first` is current, and launches go to torch's current stream there.
class Cuda {
 public:
  static constexpr bool kCuda = true;
  static constexpr bool kFormsIndicesAlways = true;

  // Throws where one of `others` lies on another device, and where the library holds no code for the device.
  Cuda(const char* op, const Tensor& first, std::initializer_list<Named> others = {});
  Cuda(const Cuda&) = delete;
  Cuda& operator=(const Cuda&) = delete;

  static void check_processor(const char*) {}
  static Dtype dtype_of(const char* op, const char* name, const Tensor& t);
  // A parameter may have any floating dtype, float64 too.
  static Parameter parameter_of(const char* op, const char* name, const OptionalTensor& v, int64_t channels);

  // Fails where there are no tensor cores' products of t's dtype, or numbers of channels would pass 32 bits.
  static void check_convolutions(const char* op, const char* name, const Tensor& t);
  static void check_form(const char*, bool) {}

  void launch(const BnScaleShift& args) const;
  void launch(const BnBackwardCoefficients& args) const;
  void launch(const BnRunningStats& args) const;
  void launch(const Cast& args) const;
  void launch(const BnStats& args) const;
  void launch(const BnAddReluForward& args) const;
  void launch(const BnAddReluBackwardReduce& args) const;
  void launch(const BnAddReluBackwardInput& args) const;
  void launch(const ReluBackward& args) const;
  void launch(const BnReluMaxpoolForward& args) const;
  void launch(const BnReluMaxpoolBackwardReduce& args) const;
  void launch(const BnReluMaxpoolBackwardInput& args) const;
  void launch(const ConvForward& args) const;
  void launch(const Conv1x1BackwardInput& args) const;
  void launch(const Conv3x3BnBackwardInput& args) const;
  void launch(const Conv1x1BackwardWeight& args) const;
  void launch(const Gram& args) const;
  void launch(const GramOutputStats& args) const;
  void launch(const GramBackwardCoefficients& args) const;
  void launch(const Conv1x1GramBackwardInput& args) const;

 private:
  // A launch with counters, which share a replay's scratch.
  template <class Args>
  void launch_with_counters(const Args& args, size_t bytes,
                            cudaError_t (*launcher)(const Args&, cuda::Workspace&, cudaStream_t)) const;
  template <class Args>
  void launch_in_scratch(const Args& args, size_t bytes,
                         cudaError_t (*launcher)(const Args&, cuda::Workspace&, cudaStream_t)) const;

  const char* op_;
  const Tensor& first_;
  cudaStream_t stream_ = nullptr;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace fusedres::front
