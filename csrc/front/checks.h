// Checks of arguments that ops of all families share. A failed check throws; the text names the op, the argument, what
// was found, what is needed, and the fix.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fusedres::front {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

[[noreturn]] inline void fail(const char* op, const char* name, const std::string& found, const std::string& needed,
                              const char* fix) {
  throw std::runtime_error(std::string("fusedres ") + op + ": " + name + " is " + found + ", needed " + needed + "; " +
                           fix + ".");
}

inline std::string sizes_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i == 0 ? "" : ", ") << t.size(i);
  text << ']';
  return text.str();
}

// The sizes, and the strides too where elements do not lie side by side.
inline std::string layout_of(const Tensor& t) {
  if (t.is_contiguous()) return sizes_of(t);
  std::ostringstream text;
  text << sizes_of(t) << " of strides [";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i == 0 ? "" : ", ") << t.stride(i);
  text << ']';
  return text.str();
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "dtype number " + std::to_string(int(dtype));
  }
}

// Dense NHWC; a dimension of size 1 may have any stride.
inline bool is_channels_last(const Tensor& t) {
  int64_t expected = 1;
  if (t.numel() == 0) return true;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline void check_device(const char* op, const char* name, const Tensor& t, bool cuda) {
  if (t.is_cuda() != cuda || t.is_cpu() == cuda) {
    fail(op, name, "on another device", cuda ? "a CUDA tensor" : "a CPU tensor",
         "move every argument to the device of the first");
  }
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline void check_channels_last(const char* op, const char* name, const Tensor& t) {
  if (t.dim() != 4) fail(op, name, sizes_of(t), "[N, C, H, W]", "pass a batch of images, or a convolution's weight");
  if (!is_channels_last(t)) {
    fail(op, name, "not channels_last", "dense channels_last memory",
         "call .contiguous(memory_format=torch.channels_last)");
  }
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  return a.size(0) == b.size(0) && a.size(1) == b.size(1) && a.size(2) == b.size(2) && a.size(3) == b.size(3);
}

// t has the sizes, the memory format and the device of `like`.
inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like, ScalarType dtype) {
  check_channels_last(op, name, t);
  check_device(op, name, t, like.is_cuda());
  if (!same_sizes(t, like)) fail(op, name, sizes_of(t), sizes_of(like), "pass tensors of one shape");
  if (t.scalar_type() != dtype) {
    fail(op, name, dtype_name(t.scalar_type()), dtype_name(dtype), "pass tensors of one dtype");
  }
}
inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_like(op, name, t, like, like.scalar_type());
}
inline void check_like(const char* op, const char* name, const OptionalTensor& t, const Tensor& like) {
  if (t) check_like(op, name, *t, like);
}

// Whether the memory of dense a and b overlaps.
inline bool share_memory(const Tensor& a, const Tensor& b) {
  const auto begin = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()); };
  const auto bytes = [](const Tensor& t) { return uintptr_t(t.numel()) * t.element_size(); };
  return begin(a) < begin(b) + bytes(b) && begin(b) < begin(a) + bytes(a);
}

// v is a float32 vector [channels].
inline void check_vector(const char* op, const char* name, const Tensor& v, int64_t channels) {
  if (v.scalar_type() != ScalarType::Float) {
    fail(op, name, dtype_name(v.scalar_type()), "float32", "channel vectors have the accumulation dtype");
  }
  if (v.dim() != 1 || v.size(0) != channels || !v.is_contiguous()) {
    fail(op, name, layout_of(v), "contiguous [" + std::to_string(channels) + "]", "pass one value a channel");
  }
}
inline void check_vector(const char* op, const char* name, const OptionalTensor& v, int64_t channels) {
  if (v) check_vector(op, name, *v, channels);
}

inline void check_mask(const char* op, const Tensor& mask, const Tensor& like) {
  const int64_t bytes = (like.numel() + 7) / 8;
  if (mask.scalar_type() != ScalarType::Byte || mask.dim() != 1 || mask.size(0) != bytes || !mask.is_contiguous()) {
    fail(op, "mask", dtype_name(mask.scalar_type()) + " " + layout_of(mask),
         "contiguous uint8 [" + std::to_string(bytes) + "]", "pass the mask of bn_add_relu_forward");
  }
}
inline void check_mask(const char* op, const OptionalTensor& mask, const Tensor& like) {
  if (mask) check_mask(op, *mask, like);
}

inline void check_together(const char* op, const char* name, bool first, bool second) {
  if (first != second) fail(op, name, "given in part", "both or neither", "pass the pair");
}

}  // namespace fusedres::front
