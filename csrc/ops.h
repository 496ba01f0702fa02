// One struct for each op of the library: what its launchers read and write, on the CPU and on CUDA. The front fills the
// structs; cpu/launch.h and cuda/launchers.h declare the launchers. Maths: fusedres/ops/contract/.
//
// Activations are NHWC: rows x channels, rows = N*H*W, dense, any alignment. Channel vectors are float32 [C]. All
// pointers are of one device. Outputs overlap nothing, except where a comment names an input for the in-place op.
//
// cpu/kernels.h includes this file, so it includes no C++ library, and the kernels call none of its functions.
#pragma once

#include <cstdint>

namespace fusedres {

// float32 is 0: GCC takes `dtype == x` for unlikely where x is not 0, and would lay out the CPU kernels accordingly.
// float64 is for parameters only.
enum class Dtype : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct Shape {
  Dtype dtype;
  int64_t rows;      // P = N*H*W
  int64_t channels;  // C
};

struct Parameter {
  const void* data;  // [C], or null: 1 for a weight, 0 for a bias
  Dtype dtype;       // float32 on the CPU
};

// ------------------------------------------------------------------------------------------ channel vectors

struct BnScaleShift {
  int64_t channels;
  const float* mean;  // [C]
  const float* var;   // [C] biased
  Parameter weight;
  Parameter bias;
  double eps;
  float* invstd;  // [C] (var + eps)^-1/2
  float* scale;   // [C] weight * invstd
  float* shift;   // [C] bias - mean*scale
};

struct BnBackwardCoefficients {
  int64_t channels;
  int64_t rows;
  const float* sum_dz;           // [C]
  const float* sum_dz_centered;  // [C]
  const float* mean;             // [C] this and the next two: the forward's vectors
  const float* invstd;           // [C]
  const float* scale;            // [C]
  float* dweight;                // [C]
  float* B;                      // [C], null with K: frozen statistics
  float* K;                      // [C]
};

// Of several BNs at once: running = keep*running + weight*batch, by `unbiased` for the variance, and counter += 1.
struct BnRunningStats {
  static constexpr int kMost = 8;
  struct Norm {
    int64_t channels;
    const float* mean;    // [C] of the batch
    const float* var;     // [C] biased
    float* running_mean;  // [C]
    float* running_var;   // [C]
    int64_t* counter;     // [] or null
    float keep, weight, unbiased;
  };
  int count;
  Norm norms[kMost];
};

// ------------------------------------------------------------------------------------------ parameters

// Of several tensors at once: to = from, in to's dtype, rounded to nearest even. No dtype is float64.
struct Cast {
  static constexpr int kMost = 16;
  struct Flat {
    int64_t numel;
    const void* from;  // [numel]
    void* to;          // [numel]
  };
  Dtype from, to;
  int count;
  Flat tensors[kMost];
};

// ------------------------------------------------------------------------------------------ batch normalisation

struct BnStats {
  Shape shape;
  const void* c;  // [P, C]
  float* mean;    // [C]
  float* var;     // [C] biased
  // CUDA alone: the launch's last block computes these vectors if .scale is set. .channels, .mean, .var are not read.
  BnScaleShift scale_shift = {};
};

struct BnAddReluForward {
  Shape shape;
  const void* c;                // [P, C]
  const float* scale;           // [C]
  const float* shift;           // [C]
  const void* residual;         // [P, C] or null
  const float* residual_scale;  // [C], null with residual_shift: the residual as it is
  const float* residual_shift;  // [C]
  bool relu;
  void* y;        // [P, C]; in place, on the CPU: c
  uint8_t* mask;  // [ceil(P*C / 8)] or null
};

// dz = dy where `mask` has a bit; without a mask, if `relu`, where round(scale*c + shift) > 0; else dy itself.
struct BnAddReluBackwardReduce {
  Shape shape;
  const void* dy;       // [P, C]
  const void* c;        // [P, C]
  const uint8_t* mask;  // [ceil(P*C / 8)] or null
  bool relu;
  const float* mean;           // [C]
  const float* scale;          // [C], read if the sign of scale*c + shift is the mask
  const float* shift;          // [C]
  const void* shortcut_c;      // [P, C], with shortcut_sum
  const float* shortcut_mean;  // [C], with shortcut_sum
  float* sum_dz;               // [C]
  float* sum_dz_centered;      // [C] sum dz*(c - mean)
  float* shortcut_sum;         // [C] sum dz*(shortcut_c - shortcut_mean), or null: no projection
  // CUDA alone: the launch's last block computes these vectors if .dweight is set. .channels and the sums are not read.
  BnBackwardCoefficients coefficients = {};
  BnBackwardCoefficients shortcut_coefficients = {};
};

struct Coefficients {
  const float* A;  // [C] dc = A*dz + B*c + K
  const float* B;  // [C], null with K: dc = A*dz
  const float* K;  // [C]
};

struct BnAddReluBackwardInput {
  Shape shape;
  const void* dy;       // [P, C]
  const void* c;        // [P, C]
  const uint8_t* mask;  // this and the next three: as in BnAddReluBackwardReduce
  bool relu;
  const float* scale;  // [C]
  const float* shift;  // [C]
  Coefficients grads;
  const void* shortcut_c;       // [P, C] or null
  Coefficients shortcut_grads;  // with shortcut_c
  void* dc;                     // [P, C]; in place, on the CPU: dy or c
  void* dresidual;              // [P, C]: the projection's gradient with shortcut_c, dz without; null: none;
                                // in place, on the CPU: shortcut_c
};

struct ReluBackward {
  Dtype dtype;
  int64_t numel;
  const void* dy;       // [numel]
  const uint8_t* mask;  // [ceil(numel / 8)]
  void* dz;             // [numel] dy where the mask has a bit, else 0
};

// ------------------------------------------------------------------------------------------ stem

struct Pooling {
  Dtype dtype;
  int64_t batch, height, width, channels;        // of c; P = batch*height*width
  int kernel_size = 1, stride = 1, padding = 0;  // square, kernel_size <= 15, padding <= kernel_size / 2

  // The host divides once; a kernel would divide 64-bit numbers for every row.
  int64_t pooled_height = pooled(height);
  int64_t pooled_width = pooled(width);

  constexpr int64_t pooled(int64_t size) const {
    return stride > 0 ? (size + 2 * padding - kernel_size) / stride + 1 : 0;
  }
};

struct BnReluMaxpoolForward {
  Pooling pooling;
  const void* c;       // [N, H, W, C]
  const float* scale;  // [C]
  const float* shift;  // [C]
  void* y;             // [N, H', W', C]
  uint8_t* indices;    // [N, H', W', C]: kh*kernel_size + kw of the first maximum, 255 where y <= 0; null, on the CPU:
                       // none
};

struct BnReluMaxpoolBackwardReduce {
  Pooling pooling;
  const void* dy;                            // [N, H', W', C]
  const uint8_t* indices;                    // [N, H', W', C]
  const void* c;                             // [N, H, W, C]
  const float* mean;                         // [C]
  float* sum_dz;                             // [C]
  float* sum_dz_centered;                    // [C]
  BnBackwardCoefficients coefficients = {};  // as in BnAddReluBackwardReduce
};

struct BnReluMaxpoolBackwardInput {
  Pooling pooling;
  const void* dy;          // [N, H', W', C]
  const uint8_t* indices;  // [N, H', W', C]
  const void* c;           // [N, H, W, C]
  Coefficients grads;
  void* dc;  // [N, H, W, C]
};

// ------------------------------------------------------------------------------------------ convolutions

// One axis of a convolution: sizes of x and dy, and the taps along it.
struct ConvAxis {
  int64_t in, out, kernel, stride, padding, dilation;
};

struct ConvBackwardWeight {
  Dtype dtype;
  int64_t batch, in_channels, out_channels;
  ConvAxis height, width;
  const void* dy;  // [N, height.out, width.out, out_channels]
  const void* x;   // [N, height.in, width.in, in_channels]
  float* dw;       // [out_channels, height.kernel, width.kernel, in_channels]
};

// The input gradient of a 1x1 convolution without padding.
struct ConvBackwardInput {
  Dtype dtype;
  int64_t batch, in_channels, out_channels;
  ConvAxis height, width;
  const void* dy;           // [N, height.out, width.out, out_channels]
  const void* weight;       // [out_channels, in_channels]
  const void* shortcut_dy;  // like dx, added to the gradient, or null; in place, dx
  const uint8_t* mask;      // one bit an element: where shortcut_dy is added; null: everywhere
  void* dx;                 // [N, height.in, width.in, in_channels]
  bool kept = false;        // whether dx lies in memory that is kept between calls
};

// A 1x1 convolution, or on CUDA a 3x3 one with padding 1, BN with known vectors, addition and ReLU.
struct ConvForward {
  Dtype dtype;
  int64_t rows, in_channels, out_channels;  // P, of y
  const void* x;                            // [N, height.in, width.in, in_channels]: [P, in_channels] without strides
  const void* weight;                       // [out_channels, kernel, kernel, in_channels]
  const float* scale;                       // [out_channels], null with shift: 1 and 0
  const float* shift;                       // [out_channels]
  const void* residual;                     // like y, or null
  const float* residual_scale;              // [out_channels], null with residual_shift: the residual as it is
  const float* residual_shift;              // [out_channels]
  bool relu;
  void* y;  // [P, out_channels]
  ConvAxis height = {}, width = {};
  // CUDA alone
  const void* bias = nullptr;       // [out_channels] in dtype, or null
  const float* in_scale = nullptr;  // [in_channels], null with in_shift: x itself, else relu(in_scale*x + in_shift)
  const float* in_shift = nullptr;  // [in_channels]
  uint8_t* mask = nullptr;          // [ceil(P*out_channels / 8)] of y, or null
  float* mean = nullptr;            // [out_channels] of y, null with var: not wanted
  float* var = nullptr;             // [out_channels] biased
};

// dc = A*dz + B*c + K, rounded, and dx = dc W, plus shortcut_dy, of a 1x1 convolution without stride. CUDA alone.
struct Conv1x1BackwardInput {
  Dtype dtype;
  int64_t rows, in_channels, out_channels;
  const void* dy;  // [P, out_channels]
  const void* c;   // [P, out_channels]
  bool relu;       // dz = dy where round(scale*c + shift) > 0; else dy itself
  const float* scale;
  const float* shift;
  Coefficients grads;
  const void* weight;       // [out_channels, in_channels]
  const void* shortcut_dy;  // like dx, added to it, or null
  const uint8_t* mask;      // one bit an element: where shortcut_dy is added; null: everywhere
  void* dx;                 // [P, in_channels]
  void* dc;                 // [P, out_channels]
};

// The same of a 3x3 convolution without stride, with padding 1, weight [out_channels, 3, 3, in_channels]. c is null
// with dc, the vectors and the coefficients where dc is dy. width <= 126
struct Conv3x3BnBackwardInput : Conv1x1BackwardInput {
  int64_t height, width;
};

// Rc = dz^T (a - center) and dbias = sum dz, with a = relu(scale*c + shift), rounded. CUDA alone.
struct Conv1x1BackwardWeight {
  Dtype dtype;
  int64_t rows, in_channels, out_channels;
  const void* dy;       // [P, out_channels]
  const uint8_t* mask;  // one bit an element of dy, or null: dz = dy
  const void* c;        // [P, in_channels]
  const float* scale;   // [in_channels]
  const float* shift;   // [in_channels]
  const float* center;  // [in_channels], or null: 0
  float* r;             // [out_channels, in_channels]
  float* dbias;         // [out_channels]
};

// m = E[a] and S = E[(a - m)(a - m)^T], with a = relu(scale*c + shift), rounded. CUDA alone.
struct Gram {
  Dtype dtype;
  int64_t rows, channels;
  const void* c;       // [P, C]
  const float* scale;  // [C]
  const float* shift;  // [C]
  float* m;            // [C]
  float* S;            // [C, C]
};

// Of the 1x1 convolution of an activation with the moments m and S: the statistics of its output, mean = W m + bias and
// var = max(diag(W S W^T), 0), and m as a value of the activation dtype. CUDA alone.
struct GramOutputStats {
  Dtype dtype;
  int64_t in_channels, out_channels;
  const void* weight;  // [out_channels, in_channels]
  const void* bias;    // [out_channels] in dtype, or null
  const float* m;      // [in_channels]
  const float* S;      // [in_channels, in_channels]
  float* mean;         // [out_channels]
  float* var;          // [out_channels] biased
  float* center;       // [in_channels]
};

// From Rc and sum dz of Conv1x1BackwardWeight the gradients of the convolution's and the BN's weights, and the
// coefficients of Conv1x1GramBackwardInput. Those from m to center, weight_a and offset are null together: frozen
// statistics. CUDA alone.
struct GramBackwardCoefficients {
  Dtype dtype;
  int64_t rows, in_channels, out_channels;
  const float* r;       // [out_channels, in_channels]
  const float* sum_dz;  // [out_channels]
  const void* weight;   // [out_channels, in_channels]
  const void* bias;     // [out_channels] in dtype, or null
  const float* mean;    // [out_channels] this and the next two: the forward's vectors
  const float* invstd;  // [out_channels]
  const float* scale;   // [out_channels]
  const float* m;       // [in_channels]
  const float* S;       // [in_channels, in_channels]
  const float* center;  // [in_channels]
  float* dweight;       // [out_channels]
  float* dW;            // [out_channels, in_channels]
  float* weight_dz;     // [out_channels, in_channels]
  float* weight_a;      // [in_channels, in_channels]
  float* offset;        // [in_channels]
};

// dz_below = da where a = relu(scale*c + shift), rounded, is positive, with
// da = dz weight_dz + (a - center) weight_a + offset, and the sums of dz_below for the BN below. CUDA alone.
struct Conv1x1GramBackwardInput {
  Dtype dtype;
  int64_t rows, in_channels, out_channels;
  const void* dy;          // [P, out_channels]
  const uint8_t* mask;     // one bit an element of dy, or null: dz = dy
  const void* c;           // [P, in_channels]
  const float* mean;       // [in_channels]
  const float* scale;      // [in_channels]
  const float* shift;      // [in_channels]
  const float* weight_dz;  // [out_channels, in_channels]
  const float* weight_a;   // [in_channels, in_channels], null with center and offset: frozen statistics
  const float* center;     // [in_channels]
  const float* offset;     // [in_channels]
  void* dz_below;          // [P, in_channels]
  float* sum_dz;           // [in_channels]
  float* sum_dz_centered;  // [in_channels] sum dz_below*(c - mean)
};

// 3x3 convolutions without stride, with padding 1, in float32, by Winograd's algorithm F(tile x tile, 3x3): tile is 2
// or
// 4. Where an input or a sum is not finite, the results are not those of a direct convolution: the launchers return
// whether every result of the convolution is finite.
struct Conv3x3 {
  int64_t batch, height, width, in_channels, out_channels;
  int64_t tile;
};

struct Conv3x3Forward : Conv3x3 {
  const float* x;               // [N, H, W, in_channels]
  const float* weight;          // [out_channels, 3, 3, in_channels]
  const float* in_scale;        // [in_channels], null with in_shift: x itself, else relu(in_scale*x + in_shift)
  const float* in_shift;        // [in_channels]
  const float* scale;           // [out_channels], null with shift: no epilogue
  const float* shift;           // [out_channels]
  const float* residual;        // like y, or null
  const float* residual_scale;  // [out_channels], null with residual_shift: the residual as it is
  const float* residual_shift;  // [out_channels]
  bool relu;
  float* y;     // [N, H, W, out_channels]
  float* mean;  // [out_channels] of y, null with var: not wanted
  float* var;   // [out_channels] biased
};

struct Conv3x3BackwardInput : Conv3x3 {
  const float* dy;           // [N, H, W, out_channels]
  const float* weight;       // [out_channels, 3, 3, in_channels]
  const float* shortcut_dy;  // like dx, added to the gradient, or null
  const uint8_t* mask;       // one bit an element: where shortcut_dy is added; null: everywhere
  float* dx;                 // [N, H, W, in_channels]; may be shortcut_dy
};

struct Conv3x3BackwardWeight : Conv3x3 {
  const float* dy;        // [N, H, W, out_channels]
  const float* x;         // [N, H, W, in_channels]
  const float* in_scale;  // as in Conv3x3Forward
  const float* in_shift;
  float* dw;  // [out_channels, 3, 3, in_channels]
};

}  // namespace fusedres
