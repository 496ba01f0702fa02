// Winograd's algorithms F(m x m, 3x3): m x m results of a 3x3 convolution from a tile of (m + 2) x (m + 2) inputs, with
// (m + 2)^2 products a channel in the place of 9 m^2. With X an input tile, W the taps and * the elementwise product,
//     Y = A^T ((G W G^T) * (B^T X B)) A
// A, B and G follow from the points at which the two polynomials are multiplied (Toom-Cook; A. Lavin and S. Gray, Fast
// Algorithms for Convolutional Neural Networks, 2016). The weight gradient is the transpose of the same algorithm:
//     dW = G^T (sum over tiles (A dY A^T) * (B^T X B)) G
// Every function is over vectors of channels. Included after vec_avx2.h or vec_avx512.h.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "lanes.h"

namespace {

#define FUSEDRES_UNROLLED _Pragma("GCC unroll 8")

// F(2x2, 3x3), at the points 0, 1, -1 and infinity: more accurate than nine products summed.
struct SmallTile {
  static constexpr int kOutputs = 2, kInputs = 4;

  static FUSEDRES_INLINE void input(const Float* x, Float* v) {  // B^T x
    v[0] = x[0] - x[2];
    v[1] = x[1] + x[2];
    v[2] = x[2] - x[1];
    v[3] = x[1] - x[3];
  }
  static FUSEDRES_INLINE void output(const Float* m, Float* y) {  // A^T m
    y[0] = (m[1] + m[2]) + m[0];
    y[1] = (m[1] - m[2]) - m[3];
  }
  static FUSEDRES_INLINE void output_gradient(const Float* dy, Float* d) {  // A dy
    d[0] = dy[0];
    d[1] = dy[0] + dy[1];
    d[2] = dy[0] - dy[1];
    d[3] = zero() - dy[1];
  }
  static FUSEDRES_INLINE void weight(const Float* w, Float* u) {  // G w
    const Float ends = (w[0] + w[2]) * set(0.5f), middle = w[1] * set(0.5f);
    u[0] = w[0];
    u[1] = ends + middle;
    u[2] = ends - middle;
    u[3] = w[2];
  }
  static FUSEDRES_INLINE void weight_gradient(const Float* m, Float* dw) {  // G^T m
    const Float sum = (m[1] + m[2]) * set(0.5f);
    dw[0] = m[0] + sum;
    dw[1] = (m[1] - m[2]) * set(0.5f);
    dw[2] = sum + m[3];
  }
};

// F(4x4, 3x3), at the points 0, +-a, +-b and infinity. a = 5/8 and b = 3/2 were found by a search for the least error;
// with the usual 1 and 2 it exceeds the limit of fusedres/ops/accuracy.py on layers of ResNet.
struct LargeTile {
  static constexpr int kOutputs = 4, kInputs = 6;

  static constexpr double a = 0.625, b = 1.5, a2 = a * a, b2 = b * b;
  static constexpr double at_0 = 1 / (a2 * b2), at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));

  static FUSEDRES_INLINE Float number(double v) { return set(float(v)); }

  static FUSEDRES_INLINE void input(const Float* x, Float* v) {
    const Float even_a = fma(number(-b2), x[2], x[4]), odd_a = fma(number(-b2), x[1], x[3]);
    const Float even_b = fma(number(-a2), x[2], x[4]), odd_b = fma(number(-a2), x[1], x[3]);
    v[0] = fma(number(a2 * b2), x[0], fma(number(-a2 - b2), x[2], x[4]));
    v[1] = fma(number(a), odd_a, even_a);
    v[2] = fma(number(-a), odd_a, even_a);
    v[3] = fma(number(b), odd_b, even_b);
    v[4] = fma(number(-b), odd_b, even_b);
    v[5] = fma(number(a2 * b2), x[1], fma(number(-a2 - b2), x[3], x[5]));
  }
  static FUSEDRES_INLINE void output(const Float* m, Float* y) {
    const Float sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = m[0] + (sum_a + sum_b);
    y[1] = fma(number(b), difference_b, number(a) * difference_a);
    y[2] = fma(number(b2), sum_b, number(a2) * sum_a);
    y[3] = fma(number(b2 * b), difference_b, fma(number(a2 * a), difference_a, m[5]));
  }
  static FUSEDRES_INLINE void output_gradient(const Float* dy, Float* d) {
    const Float even_a = fma(number(a2), dy[2], dy[0]), odd_a = fma(number(a2), dy[3], dy[1]);
    const Float even_b = fma(number(b2), dy[2], dy[0]), odd_b = fma(number(b2), dy[3], dy[1]);
    d[0] = dy[0];
    d[1] = fma(number(a), odd_a, even_a);
    d[2] = fma(number(-a), odd_a, even_a);
    d[3] = fma(number(b), odd_b, even_b);
    d[4] = fma(number(-b), odd_b, even_b);
    d[5] = dy[3];
  }
  static FUSEDRES_INLINE void weight(const Float* w, Float* u) {
    const Float even_a = fma(number(a2 * at_a), w[2], number(at_a) * w[0]), odd_a = number(a * at_a) * w[1];
    const Float even_b = fma(number(b2 * at_b), w[2], number(at_b) * w[0]), odd_b = number(b * at_b) * w[1];
    u[0] = number(at_0) * w[0];
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = w[2];
  }
  static FUSEDRES_INLINE void weight_gradient(const Float* m, Float* dw) {
    const Float sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    dw[0] = fma(number(at_0), m[0], fma(number(at_a), sum_a, number(at_b) * sum_b));
    dw[1] = fma(number(a * at_a), difference_a, number(b * at_b) * difference_b);
    dw[2] = fma(number(a2 * at_a), sum_a, fma(number(b2 * at_b), sum_b, m[5]));
  }
};

// transform(transform(values)^T)^T: `from` values a side become `to`. read(row, column) -> Float, write(row, column,
// v).
template <int from, int to, class Transform, class Read, class Write>
FUSEDRES_INLINE void in_two_dimensions(Transform transform, Read read, Write write) {
  Float columns[to][from];
  FUSEDRES_UNROLLED
  for (int j = 0; j < from; ++j) {
    Float before[from], after[to];
    FUSEDRES_UNROLLED
    for (int i = 0; i < from; ++i) before[i] = read(i, j);
    transform(before, after);
    FUSEDRES_UNROLLED
    for (int i = 0; i < to; ++i) columns[i][j] = after[i];
  }
  FUSEDRES_UNROLLED
  for (int i = 0; i < to; ++i) {
    Float after[to];
    transform(columns[i], after);
    FUSEDRES_UNROLLED
    for (int j = 0; j < to; ++j) write(i, j, after[j]);
  }
}

}  // namespace
