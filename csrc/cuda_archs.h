// Which GPUs this binary runs on. A build with CUDA sets FUSEDRES_CUDA_ARCHS to the architectures it holds code for.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>

namespace fusedres {

#ifdef FUSEDRES_CUDA_ARCHS
inline std::string cuda_archs() { return FUSEDRES_CUDA_ARCHS; }
// The toolkit's version, such as 13000. front/cuda.cpp defines this function and the next.
int64_t cuda_version();
// Why the kernels cannot run on this device, "" if they can.
std::string cuda_device_problem(int device);
#else
inline std::string cuda_archs() { return ""; }
inline int64_t cuda_version() { return 0; }
inline std::string cuda_device_problem(int) { return "it holds no GPU code"; }
#endif

// Whether code for one of `archs` ("80;90;120+PTX") runs on a device of this compute capability: the same major
// version and no newer minor version, or PTX that is no newer. Code with features of an architecture ("100a") runs on
// no other architecture, and code with features of a family ("100f") on no other major version, not even as PTX.
inline bool archs_cover(const std::string& archs, int major, int minor) {
  for (size_t at = 0; at < archs.size();) {
    const size_t end = archs.find(';', at) == std::string::npos ? archs.size() : archs.find(';', at);
    const std::string entry = archs.substr(at, end - at);
    const int number = std::atoi(entry.c_str());
    const bool exact = entry.find('a') != std::string::npos, family = entry.find('f') != std::string::npos;
    const bool same = number / 10 == major && (exact ? number % 10 == minor : number % 10 <= minor);
    const bool ptx = !exact && !family && entry.find("+PTX") != std::string::npos && number <= major * 10 + minor;
    if (same || ptx) return true;
    at = end + 1;
  }
  return false;
}

}  // namespace fusedres
