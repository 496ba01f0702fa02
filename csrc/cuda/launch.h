// What launchers share: the device's limits, alignment, and the choice of a kernel by dtype.
#pragma once

#include "launchers.h"
#include "packet.h"

namespace fusedres::cuda {

// The limits of the current device. The driver is asked once per device.
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

// Calls call(Type<T>{}) for an activation dtype.
template <class Call>
cudaError_t for_dtype(Dtype dtype, Call call) {
  switch (dtype) {
    case Dtype::kFloat16: return call(Type<__half>{});
    case Dtype::kBFloat16: return call(Type<__nv_bfloat16>{});
    case Dtype::kFloat32: return call(Type<float>{});
    default: return cudaErrorInvalidValue;
  }
}

// The same for the dtypes of tensor cores' operands.
template <class Call>
cudaError_t for_half_dtype(Dtype dtype, Call call) {
  if (dtype == Dtype::kFloat16) return call(Type<__half>{});
  return dtype == Dtype::kBFloat16 ? call(Type<__nv_bfloat16>{}) : cudaErrorInvalidValue;
}

// Calls `call` with the window's size and stride as compile-time constants: 3 and 2, the stem's, or 0 and 0 for others.
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

// Calls call(std::integral_constant<bool, ...>) for a run-time flag.
template <class Call>
cudaError_t for_flag(bool flag, Call call) {
  return flag ? call(std::true_type{}) : call(std::false_type{});
}

// Checks that the workspace has `bytes`, for a launch that writes into it, and clears its counters, which come first,
// if they may not be zero.
cudaError_t prepare_workspace(Workspace& workspace, size_t bytes, int64_t counter_bytes, cudaStream_t stream);

// The same of a launch without counters.
inline cudaError_t prepare_workspace(Workspace& workspace, size_t bytes) {
  return prepare_workspace(workspace, bytes, 0, nullptr);
}

// With one group a chunk the workspace is not used.
inline cudaError_t prepare_workspace(Workspace& workspace, const TilePlan& plan, int values, cudaStream_t stream) {
  if (plan.groups == 1) return cudaSuccess;
  return prepare_workspace(workspace, plan.workspace_bytes(values), plan.counter_bytes(), stream);
}

// mask [ceil(numel / 8)]: `not (y <= 0)` of y [numel], in a pass of its own.
cudaError_t pack_mask(Dtype dtype, int64_t numel, const void* y, uint8_t* mask, cudaStream_t stream);

}  // namespace fusedres::cuda
