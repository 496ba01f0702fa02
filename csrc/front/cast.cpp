// The weights of a block in the dtype of its activations, and their gradients in the weights' own.
#include <string>
#include <vector>

#include "conv_checks.h"
#include "device_ops.h"
#include "devices.h"

namespace fusedres::front {

namespace {

// Whether elements of both lie in the same order, without gaps.
bool same_dense_layout(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  int64_t extent = 1;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i) || (a.size(i) > 1 && a.stride(i) != b.stride(i))) return false;
    extent += (a.size(i) - 1) * a.stride(i);
  }
  return a.numel() == 0 || extent == a.numel();
}

// to[i] = from[i], each pair of the same sizes and strides, and dense. All of `from` have one dtype, and all of `to`.
template <class Device>
void cast_(std::vector<Tensor> to, std::vector<Tensor> from) {
  const char* op = "cast_";
  if (from.size() != to.size()) {
    fail(op, "from", std::to_string(from.size()) + " tensors", std::to_string(to.size()), "pass one for each of `to`");
  }
  if (to.empty()) return;
  check_device(op, "to", to[0], Device::kCuda);
  const Dtype source = Device::dtype_of(op, "from", from[0]), target = Device::dtype_of(op, "to", to[0]);
  for (size_t first = 0; first < to.size(); first += Cast::kMost) {
    Cast args{source, target, 0, {}};
    const Device on(op, to[0]);
    for (size_t i = first; i < to.size() && args.count < Cast::kMost; ++i) {
      check_same_dtype(op, "to", to[i], to[0]);
      check_same_dtype(op, "from", from[i], from[0]);
      if (!same_device(to[i], to[0]) || !same_device(from[i], to[0])) {
        fail(op, "from", "on another device", "every tensor on the device of the first", "move it there");
      }
      if (!same_dense_layout(to[i], from[i])) {
        fail(op, "from", layout_of(from[i]), layout_of(to[i]), "cast into torch.empty_like(from, dtype=...)");
      }
      args.tensors[args.count++] = {to[i].numel(), from[i].const_data_ptr(), to[i].mutable_data_ptr()};
    }
    on.launch(args);
  }
}

}  // namespace

}  // namespace fusedres::front

FUSEDRES_OPS(CPU, m) { m.impl<&fusedres::front::cast_<fusedres::front::Cpu>>("cast_"); }

#ifdef USE_CUDA
FUSEDRES_OPS(CUDA, m) { m.impl<&fusedres::front::cast_<fusedres::front::Cuda>>("cast_"); }
#endif
