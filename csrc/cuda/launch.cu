#include "launch.h"

#include <atomic>

namespace fusedres::cuda {

namespace {
constexpr int kCachedDevices = 64;
std::atomic<int> cached_multiprocessors[kCachedDevices];
std::atomic<int> cached_l2_bytes[kCachedDevices];
}  // namespace

cudaError_t current_device_limits(DeviceLimits* limits) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const bool cached = device < kCachedDevices;
  int multiprocessors = cached ? cached_multiprocessors[device].load(std::memory_order_acquire) : 0;
  int l2_bytes = cached ? cached_l2_bytes[device].load(std::memory_order_relaxed) : 0;
  if (multiprocessors == 0) {
    error = cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    if (cached) {
      cached_l2_bytes[device].store(l2_bytes, std::memory_order_relaxed);
      cached_multiprocessors[device].store(multiprocessors, std::memory_order_release);
    }
  }
  *limits = {multiprocessors, l2_bytes};
  return cudaSuccess;
}

cudaError_t prepare_workspace(Workspace& workspace, size_t bytes, int64_t counter_bytes, cudaStream_t stream) {
  if (workspace.bytes < bytes || !aligned_to_16(workspace.data)) return cudaErrorInvalidValue;
  const bool are_zero = workspace.zero_bytes >= counter_bytes;
  workspace.zero_bytes = counter_bytes;  // behind them are partial results
  return are_zero ? cudaSuccess : cudaMemsetAsync(workspace.data, 0, size_t(counter_bytes), stream);
}

}  // namespace fusedres::cuda
