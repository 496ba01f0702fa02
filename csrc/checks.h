// What every op asks of its arguments. A failed check throws; the text says op, argument, found, needed, fix.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fusedres {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

[[noreturn]] inline void fail(const char* op, const char* name, const std::string& found, const std::string& needed,
                              const char* fix) {
  throw std::runtime_error(std::string("fusedres ") + op + ": " + name + " is " + found + ", needed " + needed +
                           "; " + fix + ".");
}

inline std::string sizes_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i == 0 ? "" : ", ") << t.size(i);
  text << ']';
  return text.str();
}

// Sizes, and strides where elements do not lie beside each other.
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
    default: return "dtype number " + std::to_string(static_cast<int>(dtype));
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

// A tensor like another: size, dtype, memory format, device.
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

// A float32 vector of `channels`.
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

// Positions that sums were taken over; 0 of an empty batch.
inline void check_rows(const char* op, int64_t rows) {
  if (rows < 0) fail(op, "rows", std::to_string(rows), "N*H*W", "pass the number of positions of c");
}

// A pooling window, and that c [N, C, H, W] holds at least one.
inline void check_window(const char* op, const Tensor& c, int64_t kernel_size, int64_t stride, int64_t padding) {
  if (kernel_size < 1 || kernel_size > 15 || stride < 1 || padding < 0 || padding > kernel_size / 2) {
    std::ostringstream found;
    found << "kernel_size " << kernel_size << ", stride " << stride << ", padding " << padding;
    fail(op, "the window", found.str(), "kernel_size 1 to 15, stride >= 1, padding <= kernel_size/2",
         "use backend='reference'");
  }
  if (c.size(2) + 2 * padding < kernel_size || c.size(3) + 2 * padding < kernel_size) {
    fail(op, "c", sizes_of(c), "at least one window", "pass a larger image");
  }
}

// dy and indices [N, C, height, width], the pooled size, for c [N, C, H, W].
inline void check_pooled(const char* op, const Tensor& dy, const Tensor& indices, const Tensor& c, int64_t height,
                         int64_t width) {
  check_channels_last(op, "dy", dy);
  check_device(op, "dy", dy, c.is_cuda());
  check_like(op, "indices", indices, dy, ScalarType::Byte);
  if (dy.scalar_type() != c.scalar_type()) {
    fail(op, "dy", dtype_name(dy.scalar_type()), dtype_name(c.scalar_type()), "pass tensors of one dtype");
  }
  if (dy.size(0) != c.size(0) || dy.size(1) != c.size(1) || dy.size(2) != height || dy.size(3) != width) {
    fail(op, "dy", sizes_of(dy), "the shape of the pooled output", "pass the gradient of y");
  }
}

// One axis, 2 or 3, of a convolution from x to dy's shape.
inline void check_convolution(const char* op, const Tensor& dy, const Tensor& x, int64_t kernel, int64_t stride,
                              int64_t padding, int64_t dilation, int64_t axis) {
  constexpr int64_t kLargest = 1 << 20;  // products of two, and sizes of images beside them, stay far from 2^63
  const auto within = [](int64_t least, int64_t value) { return value >= least && value <= kLargest; };
  if (!within(1, kernel) || !within(1, stride) || !within(0, padding) || !within(1, dilation)) {
    std::ostringstream found;
    found << "kernel " << kernel << ", stride " << stride << ", padding " << padding << ", dilation " << dilation;
    fail(op, "the convolution", found.str(), "kernel, stride, dilation >= 1 and padding >= 0, none above 2^20",
         "pass its geometry");
  }
  const int64_t room = x.size(axis) + 2 * padding - dilation * (kernel - 1) - 1;
  const int64_t expected = room < 0 ? 0 : room / stride + 1;
  if (dy.size(0) != x.size(0) || dy.size(axis) != expected) {
    fail(op, "dy", sizes_of(dy), "the output's shape, " + std::to_string(expected) + " along dimension " +
         std::to_string(axis) + " for x " + sizes_of(x), "pass the gradient of the convolution's output");
  }
}

}  // namespace fusedres
