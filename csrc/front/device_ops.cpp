#include "device_ops.h"

#include <map>
#include <utility>

namespace fusedres::front {

namespace {

// Filled as the library is loaded, and only read afterwards. Never destroyed: threads may replay as the process ends.
std::map<std::pair<std::string, std::string>, DirectOp>& ops() {
  static auto* found = new std::map<std::pair<std::string, std::string>, DirectOp>;
  return *found;
}

}  // namespace

void keep_op(const std::string& device, const std::string& name, DirectOp op) { ops()[{device, name}] = op; }

DirectOp find_op(const std::string& device, const std::string& name) {
  const auto found = ops().find({device, name});
  return found == ops().end() ? nullptr : found->second;
}

}  // namespace fusedres::front
