// The schemas of fusedres_native: the raw ops of fusedres/raw_ops.py with named tuples taken apart. The device
// folders register their kernels for them. Built against the stable C ABI of torch 2.10: one file serves every
// Python and every torch from there on.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fusedres_native, m) {
  m.def("bn_stats(Tensor c) -> (Tensor mean, Tensor var)");
  m.def(
      "bn_scale_shift(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor invstd, Tensor scale, Tensor shift)");
  m.def(
      "bn_add_relu_forward(Tensor c, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale,"
      " Tensor? residual_shift, bool relu, bool save_mask) -> (Tensor y, Tensor? mask)");
  m.def(
      "bn_add_relu_backward_reduce(Tensor dy, Tensor c, Tensor mean, Tensor scale, Tensor shift, Tensor? mask,"
      " bool relu, Tensor? shortcut_c, Tensor? shortcut_mean)"
      " -> (Tensor sum_dz, Tensor sum_dz_centered, Tensor? sum_dz_shortcut)");
  m.def(
      "bn_backward_coefficients(Tensor sum_dz, Tensor sum_dz_centered, Tensor mean, Tensor invstd, Tensor scale,"
      " int rows, bool training) -> (Tensor dweight, Tensor? B, Tensor? K)");
  m.def(
      "bn_add_relu_backward_input(Tensor dy, Tensor c, Tensor scale, Tensor shift, Tensor A, Tensor? B, Tensor? K,"
      " Tensor? mask, bool relu, Tensor? shortcut_c, Tensor? shortcut_A, Tensor? shortcut_B, Tensor? shortcut_K,"
      " bool save_dz) -> (Tensor dc, Tensor? dresidual)");
  m.def("relu_backward(Tensor dy, Tensor mask) -> Tensor");
  m.def(
      "bn_relu_maxpool_forward(Tensor c, Tensor scale, Tensor shift, int kernel_size, int stride, int padding)"
      " -> (Tensor y, Tensor indices)");
  m.def(
      "bn_relu_maxpool_backward_reduce(Tensor dy, Tensor indices, Tensor c, Tensor mean, int kernel_size,"
      " int stride, int padding) -> (Tensor sum_dz, Tensor sum_dz_centered)");
  m.def(
      "bn_relu_maxpool_backward_input(Tensor dy, Tensor indices, Tensor c, Tensor A, Tensor? B, Tensor? K,"
      " int kernel_size, int stride, int padding) -> Tensor");
  m.def("cpu_capability() -> str");
}
