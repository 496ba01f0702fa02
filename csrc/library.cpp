// The schemas of fusedres_native: the raw ops of fusedres/ops/contract/ with named tuples taken apart. front/ registers
// the ops for each device. The library is built against the stable C ABI of torch 2.10: one file serves every Python,
// and every torch from 2.10 on.
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"
#include "cuda_archs.h"

namespace {

std::string cuda_archs() { return fusedres::cuda_archs(); }

int64_t cuda_version() { return fusedres::cuda_version(); }

std::string cuda_device_problem(int64_t device) { return fusedres::cuda_device_problem(int(device)); }

bool cuda_archs_cover(std::string archs, int64_t major, int64_t minor) {
  return fusedres::archs_cover(archs, int(major), int(minor));
}

bool cpu_multiplies_bfloat16() { return __builtin_cpu_supports("avx512bf16"); }

bool cpu_products_of_bfloat16() { return fusedres::cpu::convolutions(fusedres::Dtype::kBFloat16) != nullptr; }

bool cpu_library_is_wider() { return fusedres::cpu::library_is_wider(); }

std::string cpu_capability() {
  const fusedres::cpu::Kernels* kernels = fusedres::cpu::kernels();
  return kernels == nullptr ? "none" : kernels->name;
}

}  // namespace

STABLE_TORCH_LIBRARY(fusedres_native, m) {
  m.def("bn_stats(Tensor c) -> (Tensor mean, Tensor var)");
  m.def(
      "bn_scale_shift(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor invstd, Tensor scale, Tensor shift)");
  // to = from, in to's dtype; each pair of the same sizes and strides, dense; all of `to` of one dtype, and all of
  // `from`
  m.def("cast_(Tensor(a!)[] to, Tensor[] from) -> ()");
  // running = keep*running + weight*batch, by `unbiased` for the variance; counters, none or one for each: += 1
  m.def(
      "bn_running_stats_(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor(c!)[] counters, Tensor[] mean,"
      " Tensor[] var, float[] keep, float[] weight, float[] unbiased) -> ()");
  m.def(
      "bn_add_relu_forward(Tensor c, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale,"
      " Tensor? residual_shift, bool relu, bool save_mask) -> (Tensor y, Tensor? mask)");
  // The ops in place write y into c; dc into dy; dc into c, and the gradient of a projection into shortcut_c.
  m.def(
      "bn_add_relu_forward_out(Tensor c, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale,"
      " Tensor? residual_shift, bool relu, bool save_mask, Tensor(a!) y) -> (Tensor? mask)");
  m.def(
      "bn_add_relu_forward_(Tensor(a!) c, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale,"
      " Tensor? residual_shift, bool relu) -> ()");
  m.def(
      "bn_add_relu_backward_input_(Tensor(a!) dy, Tensor c, Tensor scale, Tensor shift, Tensor A, Tensor? B,"
      " Tensor? K, Tensor? mask, bool relu) -> ()");
  m.def(
      "bn_add_relu_backward_input_of_c_(Tensor dy, Tensor(a!) c, Tensor scale, Tensor shift, Tensor A, Tensor? B,"
      " Tensor? K, Tensor? mask, bool relu, Tensor(b!)? shortcut_c, Tensor? shortcut_A, Tensor? shortcut_B,"
      " Tensor? shortcut_K, bool save_dz) -> Tensor?");
  m.def(
      "bn_add_relu_backward_reduce(Tensor dy, Tensor c, Tensor mean, Tensor scale, Tensor shift, Tensor? mask,"
      " bool relu, Tensor? shortcut_c, Tensor? shortcut_mean)"
      " -> (Tensor sum_dz, Tensor sum_dz_centered, Tensor? sum_dz_shortcut)");
  m.def(
      "bn_backward_coefficients(Tensor sum_dz, Tensor sum_dz_centered, Tensor mean, Tensor invstd, Tensor scale,"
      " int rows, bool training) -> (Tensor dweight, Tensor? B, Tensor? K)");
  // two of the ops above at once
  m.def(
      "bn_stats_scale_shift(Tensor c, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor mean, Tensor var, Tensor invstd, Tensor scale, Tensor shift)");
  m.def(
      "bn_add_relu_backward_reduce_coefficients(Tensor dy, Tensor c, Tensor mean, Tensor scale, Tensor shift,"
      " Tensor? mask, bool relu, Tensor? shortcut_c, Tensor? shortcut_mean, Tensor invstd, int rows, bool training,"
      " Tensor? shortcut_invstd, Tensor? shortcut_scale, bool shortcut_training)"
      " -> (Tensor sum_dz, Tensor sum_dz_centered, Tensor? shortcut_sum, Tensor dweight, Tensor? B, Tensor? K,"
      " Tensor? shortcut_dweight, Tensor? shortcut_B, Tensor? shortcut_K)");
  m.def(
      "bn_add_relu_backward_input(Tensor dy, Tensor c, Tensor scale, Tensor shift, Tensor A, Tensor? B, Tensor? K,"
      " Tensor? mask, bool relu, Tensor? shortcut_c, Tensor? shortcut_A, Tensor? shortcut_B, Tensor? shortcut_K,"
      " bool save_dz) -> (Tensor dc, Tensor? dresidual)");
  m.def("relu_backward(Tensor dy, Tensor mask) -> Tensor");
  m.def(
      "bn_relu_maxpool_forward(Tensor c, Tensor scale, Tensor shift, int kernel_size, int stride, int padding,"
      " bool save_indices=True) -> (Tensor y, Tensor? indices)");
  m.def(
      "bn_relu_maxpool_backward_reduce(Tensor dy, Tensor indices, Tensor c, Tensor mean, int kernel_size,"
      " int stride, int padding) -> (Tensor sum_dz, Tensor sum_dz_centered)");
  m.def(
      "bn_relu_maxpool_backward_input(Tensor dy, Tensor indices, Tensor c, Tensor A, Tensor? B, Tensor? K,"
      " int kernel_size, int stride, int padding) -> Tensor");
  m.def(
      "bn_relu_maxpool_backward_input_out(Tensor dy, Tensor indices, Tensor c, Tensor A, Tensor? B, Tensor? K,"
      " int kernel_size, int stride, int padding, Tensor(a!) dc) -> ()");
  m.def(
      "conv_backward_weight(Tensor dy, Tensor x, int kernel_height, int kernel_width, int stride_height,"
      " int stride_width, int padding_height, int padding_width, int dilation_height, int dilation_width) -> Tensor");
  // on the CPU: no bias, prologue, mask and statistics; residual and relu after scale alone
  m.def(
      "conv1x1_forward(Tensor x, Tensor weight, Tensor? bias=None, int stride=1, Tensor? in_scale=None,"
      " Tensor? in_shift=None, Tensor? scale=None, Tensor? shift=None, Tensor? residual=None,"
      " Tensor? residual_scale=None, Tensor? residual_shift=None, bool relu=False, bool save_mask=False,"
      " bool save_stats=False) -> (Tensor y, Tensor? mask, Tensor? mean, Tensor? var)");
  // An op whose name ends in _out writes its largest result into a tensor that shares no memory with the others: on the
  // CPU alone.
  m.def(
      "conv1x1_forward_out(Tensor x, Tensor weight, int stride, Tensor? scale, Tensor? shift, Tensor? residual,"
      " Tensor? residual_scale, Tensor? residual_shift, bool relu, Tensor(a!) y) -> ()");
  // on CUDA alone
  m.def(
      "conv1x1_backward_input(Tensor dy, Tensor c, Tensor scale, Tensor shift, Tensor A, Tensor? B, Tensor? K,"
      " Tensor weight, bool relu, Tensor? shortcut_dy, Tensor? shortcut_mask) -> (Tensor dx, Tensor dc)");
  m.def(
      "conv1x1_backward_weight(Tensor dy, Tensor? mask, Tensor c, Tensor scale, Tensor shift, Tensor? center)"
      " -> (Tensor r, Tensor dbias)");
  m.def("gram(Tensor c, Tensor scale, Tensor shift) -> (Tensor m, Tensor S)");
  m.def(
      "gram_output_stats(Tensor weight, Tensor? bias, Tensor m, Tensor S)"
      " -> (Tensor mean, Tensor var, Tensor center)");
  m.def(
      "gram_backward_coefficients(Tensor r, Tensor sum_dz, Tensor weight, Tensor? bias, Tensor mean, Tensor invstd,"
      " Tensor scale, int rows, Tensor? m, Tensor? S, Tensor? center)"
      " -> (Tensor dweight, Tensor dW, Tensor weight_dz, Tensor? weight_a, Tensor? offset)");
  m.def(
      "conv1x1_gram_backward_input(Tensor dy, Tensor? mask, Tensor c, Tensor mean, Tensor scale, Tensor shift,"
      " Tensor weight_dz, Tensor? weight_a, Tensor? center, Tensor? offset)"
      " -> (Tensor dz_below, Tensor sum_dz, Tensor sum_dz_centered)");
  m.def("conv_backward_input(Tensor dy, Tensor weight, Tensor? shortcut_dy, Tensor? shortcut_mask) -> Tensor");
  m.def(
      "conv_backward_input_out(Tensor dy, Tensor weight, Tensor? shortcut_dy, Tensor? shortcut_mask, Tensor(a!) dx)"
      " -> ()");
  // for a convolution with stride; adds to dx
  m.def("conv_backward_input_(Tensor(a!) dx, Tensor dy, Tensor weight, int stride_height, int stride_width) -> ()");
  // 3x3 convolutions: on the CPU by Winograd's algorithm, without stride, mask and BN's backward; on CUDA without it,
  // tile 0, and the input gradient without stride. `finite`: whether every result of the convolution is; else the
  // results are to be thrown away.
  m.def(
      "conv3x3_forward(Tensor x, Tensor weight, Tensor? in_scale, Tensor? in_shift, Tensor? scale, Tensor? shift,"
      " Tensor? residual, Tensor? residual_scale, Tensor? residual_shift, bool relu, bool save_stats, int tile,"
      " int stride=1, bool save_mask=False) -> (Tensor y, Tensor? mask, Tensor? mean, Tensor? var, bool finite)");
  m.def(
      "conv3x3_forward_out(Tensor x, Tensor weight, Tensor? in_scale, Tensor? in_shift, Tensor? scale, Tensor? shift,"
      " Tensor? residual, Tensor? residual_scale, Tensor? residual_shift, bool relu, bool save_stats, int tile,"
      " Tensor(a!) y) -> (Tensor? mean, Tensor? var, bool finite)");
  m.def(
      "conv3x3_backward_input(Tensor dy, Tensor weight, Tensor? shortcut_dy, Tensor? shortcut_mask, int tile,"
      " Tensor? c=None, Tensor? scale=None, Tensor? shift=None, Tensor? A=None, Tensor? B=None, Tensor? K=None,"
      " bool relu=False) -> (Tensor dx, Tensor? dc, bool finite)");
  m.def(
      "conv3x3_backward_input_out(Tensor dy, Tensor weight, Tensor? shortcut_dy, Tensor? shortcut_mask, int tile,"
      " Tensor(a!) dx) -> (bool finite)");
  m.def(
      "conv3x3_backward_weight(Tensor dy, Tensor x, Tensor? in_scale, Tensor? in_shift, int tile)"
      " -> (Tensor dw, bool finite)");
  // 3x3 convolutions with groups and padding 1, float32, on the CPU; the input gradient without stride
  m.def(
      "grouped_conv3x3_forward(Tensor x, Tensor weight, int stride, Tensor? scale, Tensor? shift, bool relu)"
      " -> Tensor");
  m.def(
      "grouped_conv3x3_forward_out(Tensor x, Tensor weight, int stride, Tensor? scale, Tensor? shift, bool relu,"
      " Tensor(a!) y) -> ()");
  m.def("grouped_conv3x3_backward_input(Tensor dy, Tensor weight) -> Tensor");
  m.def("grouped_conv3x3_backward_weight(Tensor dy, Tensor x, int in_group, int stride) -> Tensor");
  // the instruction set in use; "none" below AVX2
  m.def("cpu_capability() -> str");
  // whether the processor has instructions for products of bfloat16
  m.def("cpu_multiplies_bfloat16() -> bool");
  // whether the processor has kernels for convolutions of bfloat16
  m.def("cpu_products_of_bfloat16() -> bool");
  m.def("cpu_library_is_wider() -> bool");
  // the architectures that the binary holds GPU code for, such as "80;90;120+PTX"; "" without CUDA
  m.def("cuda_archs() -> str");
  m.def("cuda_archs_cover(str archs, int major, int minor) -> bool");
  // the version of the toolkit that built the binary, such as 13000; 0 without CUDA
  m.def("cuda_version() -> int");
  // the steps of a block's pass, kept under a number until they are dropped; names: an operator a line
  m.def("recording_add(Tensor code, str names) -> int");
  m.def("recording_drop(int number) -> ()");
  // no outputs where the inputs are of other forms than the recorded ones; on an error the step that failed is kept.
  // bundle: of tensors that are inputs too, behind the others, or 0; with `keeps` results but the first become one
  m.def(
      "replay(int number, Tensor[] inputs, int bundle=0, bool keeps=False) "
      "-> (Tensor[] outputs, int bundle)");
  m.def("replay_failed_step() -> int");
  m.def("bundle_tensors(int number) -> Tensor[]");
  m.def("bundle_drop(int number) -> ()");
  // where tensors lie and what they are like, kept under a number until they are dropped; whether others are the same
  m.def("places_add(Tensor?[] tensors) -> int");
  m.def("places_drop(int number) -> ()");
  m.def("places_hold(int number, Tensor?[] tensors) -> bool");
  // why the kernels cannot run on a device, such as no code for it or no driver for the CUDA version; "" if they can
  m.def("cuda_device_problem(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("cpu_multiplies_bfloat16", TORCH_BOX(&cpu_multiplies_bfloat16));
  m.impl("cpu_products_of_bfloat16", TORCH_BOX(&cpu_products_of_bfloat16));
  m.impl("cpu_library_is_wider", TORCH_BOX(&cpu_library_is_wider));
  m.impl("cuda_archs", TORCH_BOX(&cuda_archs));
  m.impl("cuda_archs_cover", TORCH_BOX(&cuda_archs_cover));
  m.impl("cuda_version", TORCH_BOX(&cuda_version));
  m.impl("cuda_device_problem", TORCH_BOX(&cuda_device_problem));
}
