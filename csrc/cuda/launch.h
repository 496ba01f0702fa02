// What launchers share: the device's limits, alignment, and the choice of a kernel by dtype.
#pragma once

#include "launchers.h"
#include "packet.h"

namespace fusedres::cuda {

// Limits of the current device; asked of the driver once per device.
cudaError_t current_device_limits(DeviceLimits* limits);

inline int bytes_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

template <class... Pointers>
bool aligned_to_16(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

inline bool aligned_to_8(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 8 == 0; }

template <class T>
struct Type {
  using type = T;
};

// call(Type<T>{}) for an activation dtype.
template <class Call>
cudaError_t for_dtype(Dtype dtype, Call call) {
  switch (dtype) {
    case Dtype::kFloat16: return call(Type<__half>{});
    case Dtype::kBFloat16: return call(Type<__nv_bfloat16>{});
    case Dtype::kFloat32: return call(Type<float>{});
    default: return cudaErrorInvalidValue;
  }
}

// The geometry that a kernel's windows need at compile time: the stem's, or any (0, 0).
template <class Call>
cudaError_t for_window(const Pooling& pooling, Call call) {
  if (pooling.kernel_size == 3 && pooling.stride == 2)
    return call(std::integral_constant<int, 3>{}, std::integral_constant<int, 2>{});
  return call(std::integral_constant<int, 0>{}, std::integral_constant<int, 0>{});
}

inline bool valid(const Pooling& p) {
  return p.kernel_size >= 1 && p.kernel_size <= 15 && p.stride >= 1 && p.padding >= 0 &&
         2 * p.padding <= p.kernel_size && p.height + 2 * p.padding >= p.kernel_size &&
         p.width + 2 * p.padding >= p.kernel_size;
}

// call(std::integral_constant<bool, ...>) for a run-time flag.
template <class Call>
cudaError_t for_flag(bool flag, Call call) {
  return flag ? call(std::true_type{}) : call(std::false_type{});
}

// Clears the counters if they may not be zero, and checks the size. Nothing to do with one group a chunk.
cudaError_t prepare_workspace(const Workspace& workspace, const TilePlan& plan, int values, cudaStream_t stream);

}  // namespace fusedres::cuda
