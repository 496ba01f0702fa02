// Which GPUs this binary holds code for: FUSEDRES_CUDA_ARCHS is set by the build, "" without CUDA.
#pragma once

#include <cstdlib>
#include <string>

namespace fusedres {

inline std::string cuda_archs() {
#ifdef FUSEDRES_CUDA_ARCHS
  return FUSEDRES_CUDA_ARCHS;
#else
  return "";
#endif
}

// Whether code for one of `archs` ("80;90;120+PTX") runs on a device of this compute capability: the same major
// version and no newer minor one, or PTX that is no newer.
inline bool archs_cover(const std::string& archs, int major, int minor) {
  for (size_t at = 0; at < archs.size();) {
    const size_t end = archs.find(';', at) == std::string::npos ? archs.size() : archs.find(';', at);
    const std::string entry = archs.substr(at, end - at);
    const int number = std::atoi(entry.c_str());
    const bool same = number / 10 == major && number % 10 <= minor;
    const bool ptx = entry.find("+PTX") != std::string::npos && number <= major * 10 + minor;
    if (same || ptx) return true;
    at = end + 1;
  }
  return false;
}

}  // namespace fusedres
