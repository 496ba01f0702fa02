// The functions of the CUDA runtime that launchers call, for the host build.
#include <cstring>

#include "scheduler.h"

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 64;  // past the devices whose limits launchers cache: tests change the limits
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const fusedres::emulator::Device& device = fusedres::emulator::state().device;
  if (attribute == cudaDevAttrMultiProcessorCount) {
    *value = device.multiprocessors;
  } else if (attribute == cudaDevAttrL2CacheSize) {
    *value = device.l2_bytes;
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

}  // extern "C"
