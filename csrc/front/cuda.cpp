// cudart is linked statically, and libtorch_cuda is not linked: the library loads with a CPU-only torch too.
#include "cuda.h"

#include <cuda_runtime_api.h>

#include "../cuda_archs.h"
#include "allocate.h"
#include "current_stream.h"
#include "shared_scratch.h"

namespace fusedres::front {

namespace {

cudaError_t compute_capability(int device, int* major, int* minor) {
  const cudaError_t error = cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(minor, cudaDevAttrComputeCapabilityMinor, device);
}

void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next launch would report otherwise
  throw std::runtime_error(std::string("fusedres ") + op + ": the CUDA launch failed: " + cudaGetErrorString(error) +
                           ". Check earlier kernels with CUDA_LAUNCH_BLOCKING=1, or use backend='triton'.");
}

// Fails before a device's first launch, where that launch would say "no kernel image is available".
void check_runs_on(const char* op, int device) {
  static thread_local int checked = -1;
  if (device == checked) return;
  const std::string problem = cuda_device_problem(device);
  if (!problem.empty()) {
    throw std::runtime_error(std::string("fusedres ") + op + ": this library does not run on CUDA device " +
                             std::to_string(device) + ": " + problem +
                             ". Install a wheel for it, or use backend='triton'.");
  }
  checked = device;
}

}  // namespace

Cuda::Cuda(const char* op, const Tensor& first, std::initializer_list<Named> others) : op_(op), first_(first) {
  for (const Named& other : others) {
    if (other.tensor == nullptr || same_device(first, *other.tensor)) continue;
    fail(op, other.name, "on another device", "every argument on the device of the first", "move it there");
  }
  const int device = first.get_device_index();
  check_runs_on(op, device);
  int current = -1;
  check_launch(op, cudaGetDevice(&current));
  // torch's guard makes no context on the device that it goes back to
  if (device != current) guard_.emplace(device);
  stream_ = static_cast<cudaStream_t>(current_stream(first));
}

Dtype Cuda::dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Float: return Dtype::kFloat32;
    default:
      fail(op, name, dtype_name(t.scalar_type()), "float16, bfloat16 or float32",
           "convert it, or use backend='reference'");
  }
}

Parameter Cuda::parameter_of(const char* op, const char* name, const OptionalTensor& v, int64_t channels) {
  if (!v) return {nullptr, Dtype::kFloat32};
  if (v->dim() != 1 || v->size(0) != channels || !v->is_contiguous()) {
    fail(op, name, layout_of(*v), "contiguous [" + std::to_string(channels) + "]", "pass one value a channel");
  }
  return {v->const_data_ptr(), v->scalar_type() == ScalarType::Double ? Dtype::kFloat64 : dtype_of(op, name, *v)};
}

void Cuda::check_convolutions(const char* op, const char* name, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Half && t.scalar_type() != ScalarType::BFloat16) {
    fail(op, name, dtype_name(t.scalar_type()), "float16 or bfloat16", "convert it, or use backend='reference'");
  }
  if (t.size(1) > cuda::kMaxChannels) {
    fail(op, name, std::to_string(t.size(1)) + " channels", "at most 2^26", "use backend='reference'");
  }
}

// torch allocates the scratch. It is given back at once, and only later work of this stream reuses it.
template <class Args>
void Cuda::launch_in_scratch(const Args& args, size_t bytes,
                             cudaError_t (*launcher)(const Args&, cuda::Workspace&, cudaStream_t)) const {
  cuda::Workspace workspace{nullptr, bytes, 0};
  std::optional<Tensor> scratch;
  if (bytes > 0) scratch = new_bytes(first_, int64_t(bytes));
  if (scratch) workspace.data = scratch->mutable_data_ptr();
  check_launch(op_, launcher(args, workspace, stream_));
}

template <class Args>
void Cuda::launch_with_counters(const Args& args, size_t bytes,
                                cudaError_t (*launcher)(const Args&, cuda::Workspace&, cudaStream_t)) const {
  SharedScratch* const shared = SharedScratch::current();
  if (shared == nullptr || bytes == 0) return launch_in_scratch(args, bytes, launcher);
  std::optional<Tensor>& memory = shared->memory;
  if (!memory || size_t(memory->numel()) < bytes || !same_device(first_, *memory)) {
    memory.reset();  // which serves again at once, on this stream
    memory = new_bytes(first_, int64_t(bytes));
    shared->zero_bytes = 0;
  }
  cuda::Workspace workspace{memory->mutable_data_ptr(), size_t(memory->numel()), shared->zero_bytes};
  shared->zero_bytes = 0;  // unless the launch succeeds
  check_launch(op_, launcher(args, workspace, stream_));
  shared->zero_bytes = workspace.zero_bytes;
}

void Cuda::launch(const BnRunningStats& args) const { check_launch(op_, cuda::bn_running_stats(args, stream_)); }
void Cuda::launch(const BnScaleShift& args) const { check_launch(op_, cuda::bn_scale_shift(args, stream_)); }
void Cuda::launch(const BnBackwardCoefficients& args) const {
  check_launch(op_, cuda::bn_backward_coefficients(args, stream_));
}
void Cuda::launch(const Cast& args) const { check_launch(op_, cuda::cast(args, stream_)); }
void Cuda::launch(const BnStats& args) const {
  launch_with_counters(args, cuda::bn_stats_workspace(args.shape), cuda::bn_stats);
}
void Cuda::launch(const BnAddReluForward& args) const { check_launch(op_, cuda::bn_add_relu_forward(args, stream_)); }
void Cuda::launch(const BnAddReluBackwardReduce& args) const {
  const size_t bytes = cuda::bn_add_relu_backward_reduce_workspace(args.shape);
  launch_with_counters(args, bytes, cuda::bn_add_relu_backward_reduce);
}
void Cuda::launch(const BnAddReluBackwardInput& args) const {
  check_launch(op_, cuda::bn_add_relu_backward_input(args, stream_));
}
void Cuda::launch(const ReluBackward& args) const { check_launch(op_, cuda::relu_backward(args, stream_)); }
void Cuda::launch(const BnReluMaxpoolForward& args) const {
  check_launch(op_, cuda::bn_relu_maxpool_forward(args, stream_));
}
void Cuda::launch(const BnReluMaxpoolBackwardReduce& args) const {
  const size_t bytes = cuda::bn_relu_maxpool_backward_reduce_workspace(args.pooling);
  launch_with_counters(args, bytes, cuda::bn_relu_maxpool_backward_reduce);
}
void Cuda::launch(const BnReluMaxpoolBackwardInput& args) const {
  check_launch(op_, cuda::bn_relu_maxpool_backward_input(args, stream_));
}
void Cuda::launch(const ConvForward& args) const {
  const bool pointwise = args.height.kernel == 1;
  launch_with_counters(args, cuda::conv_forward_workspace(args),
                       pointwise ? cuda::conv1x1_forward : cuda::conv3x3_forward);
}
void Cuda::launch(const Conv1x1BackwardInput& args) const {
  check_launch(op_, cuda::conv1x1_backward_input(args, stream_));
}
void Cuda::launch(const Conv3x3BnBackwardInput& args) const {
  check_launch(op_, cuda::conv3x3_backward_input(args, stream_));
}
void Cuda::launch(const Conv1x1BackwardWeight& args) const {
  launch_in_scratch(args, cuda::conv1x1_backward_weight_workspace(args), cuda::conv1x1_backward_weight);
}
void Cuda::launch(const Gram& args) const { launch_in_scratch(args, cuda::gram_workspace(args), cuda::gram); }
void Cuda::launch(const GramOutputStats& args) const {
  launch_in_scratch(args, cuda::gram_output_stats_workspace(args), cuda::gram_output_stats);
}
void Cuda::launch(const GramBackwardCoefficients& args) const {
  launch_in_scratch(args, cuda::gram_backward_coefficients_workspace(args), cuda::gram_backward_coefficients);
}
void Cuda::launch(const Conv1x1GramBackwardInput& args) const {
  const size_t bytes = cuda::conv1x1_gram_backward_input_workspace(args);
  launch_with_counters(args, bytes, cuda::conv1x1_gram_backward_input);
}

}  // namespace fusedres::front

namespace fusedres {

int64_t cuda_version() { return CUDART_VERSION; }

std::string cuda_device_problem(int device) {
  int major = 0, minor = 0;
  const cudaError_t error = front::compute_capability(device, &major, &minor);
  if (error != cudaSuccess) {
    cudaGetLastError();  // clears the error, which the next launch would report otherwise
    return "its CUDA " + std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) +
           " says: " + cudaGetErrorString(error);
  }
  if (!archs_cover(cuda_archs(), major, minor)) {
    return "it holds code for " + cuda_archs() + ", needed sm_" + std::to_string(major * 10 + minor);
  }
  if (front::find_current_stream() == nullptr) return "it needs a CUDA build of torch >= 2.10";
  return "";
}

}  // namespace fusedres
