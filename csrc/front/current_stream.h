// torch's current CUDA stream. libtorch_cuda is not linked, so that the library loads with a CPU-only torch too: the
// function is looked up there at the first question.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/tensor.h>

namespace fusedres::front {

using CurrentStream = AOTITorchError (*)(int32_t, void**);

// Null where torch is no CUDA build, or older than 2.10.
inline CurrentStream find_current_stream() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = torch_cuda == nullptr ? nullptr : dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<CurrentStream>(symbol);
}

// Of t's device, a cudaStream_t; null on a CPU.
inline void* current_stream(const torch::stable::Tensor& t) {
  if (t.is_cpu()) return nullptr;
  static const CurrentStream ask = find_current_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(ask(t.get_device_index(), &stream));
  return stream;
}

}  // namespace fusedres::front
