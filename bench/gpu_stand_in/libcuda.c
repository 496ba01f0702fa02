// A libcuda.so.1 for machines without a GPU: Triton's launcher and driver load kernels and launch them here, and none
// runs. Launches are counted; loading and launching fail with the codes that a test sets.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int Result;  // CUresult: 0 is success

unsigned long stand_in_launches = 0;
int stand_in_load_error = 0;          // what loading a module gives
int stand_in_launch_error = 0;        // what a launch gives
int stand_in_shared_memory = 232448;  // of a block

static int context, module;
// functions are told apart by name: the probe's result is looked at
static int function, probe_function;

enum {
  MULTIPROCESSORS = 16,
  REGISTERS = 82,
  WARP = 10,
  CLOCK = 13,
  MEMORY_CLOCK = 36,
  BUS_WIDTH = 37,
  SHARED_MEMORY = 81,
  MAJOR = 75,
  MINOR = 76,
};

// an H200's
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case MULTIPROCESSORS: *value = 132; break;
    case REGISTERS: *value = 65536; break;
    case WARP: *value = 32; break;
    case CLOCK: *value = 1980000; break;
    case MEMORY_CLOCK: *value = 3201000; break;
    case BUS_WIDTH: *value = 6144; break;
    case SHARED_MEMORY: *value = 233472; break;
    case MAJOR: *value = 9; break;
    case MINOR: *value = 0; break;
    default: *value = stand_in_shared_memory;  // of a block, opted in or not; nobody asks for more
  }
  return 0;
}

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int* version) { return *version = 13000, 0; }
Result cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
Result cuDeviceGetCount(int* count) { return *count = 1, 0; }
Result cuCtxGetCurrent(void** current) { return *current = &context, 0; }
Result cuCtxGetDevice(int* device) { return *device = 0, 0; }
Result cuStreamIsCapturing(void* stream, int* status) { return *status = 0, 0; }
Result cuCtxSetCurrent(void* current) { return 0; }
Result cuCtxGetLimit(size_t* value, int limit) { return *value = 0, 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuDevicePrimaryCtxRetain(void** retained, int device) { return *retained = &context, 0; }

Result cuModuleLoadData(void** loaded, const void* image) { return *loaded = &module, stand_in_load_error; }
Result cuModuleUnload(void* loaded) { return 0; }
Result cuModuleGetFunction(void** found, void* in, const char* name) {
  *found = strcmp(name, "probe_kernel") == 0 ? &probe_function : &function;
  return 0;
}
Result cuFuncGetAttribute(int* value, int attribute, void* of) {
  return *value = attribute == 0 ? 1024 : 0, 0;  // the first: threads of a block
}
Result cuFuncSetAttribute(void* of, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void* of, int config) { return 0; }

static Result launch(void* launched, void** arguments) {
  if (stand_in_launch_error) return stand_in_launch_error;
  stand_in_launches++;
  if (launched == &probe_function) **(int32_t**)arguments[0] = 1;
  return 0;
}
Result cuLaunchKernelEx(const void* config, void* launched, void** arguments, void** extra) {
  return launch(launched, arguments);
}
Result cuLaunchKernel(void* launched, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                      unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** arguments,
                      void** extra) {
  return launch(launched, arguments);
}

Result cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  return *(uint64_t*)data = pointer, 0;  // of the device, as it is of the host
}
Result cuGetErrorString(Result error, const char** text) {
  switch (error) {
    case 2: *text = "out of memory"; break;
    case 209: *text = "no kernel image is available for execution on the device"; break;
    case 222: *text = "the provided PTX was compiled with an unsupported toolchain."; break;
    case 700: *text = "an illegal memory access was encountered"; break;
    case 701: *text = "too many resources requested for launch"; break;
    default: *text = "unknown error";
  }
  return 0;
}
Result cuOccupancyMaxActiveClusters(int* clusters, void* of, const void* config) { return *clusters = 1, 0; }
Result cuTensorMapEncodeTiled() { return 0; }
Result cuTensorMapEncodeIm2col() { return 0; }
Result cuMemGetAddressRange_v2(void* base, size_t* size, uint64_t pointer) { return 0; }
