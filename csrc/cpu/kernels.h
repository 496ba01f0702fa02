// The CPU kernels' interface: plain structs and functions, no torch, no C++ library, so that a file compiled for
// AVX-512 leaves no inline function behind that the linker could pick for an older processor.
//
// Tensors are NHWC, dense: a flat array of P*C elements. `period` is a multiple of C and of the vector width; the
// flat array is walked in rows of `period` elements, and every channel vector is repeated to that length.
#pragma once

#include <cstdint>

#include "../ops.h"

namespace fusedres::cpu {

using fusedres::Coefficients;  // here with vectors of [period]
using fusedres::ConvAxis;
using fusedres::Dtype;  // float32 and bfloat16

enum class Residual { kNone, kIdentity, kProjection };
enum class Gradient {
  kPlain,
  kMask,
  kSign
};  // where dz comes from: dy; dy and mask; dy and the sign of scale*c + shift

struct SampleArgs {
  Dtype dtype;
  const void* c;  // [rows, channels]
  int64_t channels;
  const int64_t* rows;  // those that are taken
  int64_t samples;
  float* mean;  // [channels]: of the samples but the smallest and the largest, from three on
};

struct StatsArgs {
  Dtype dtype;
  const void* c;       // [rows, period]
  const float* shift;  // [period], about the mean: what is summed is c - shift
  float* partial;      // [2, period], scratch
  double* sums;        // [2, period]: += sum d, sum d*d with d = c - shift
  int64_t period;
};

struct ForwardArgs {
  Dtype dtype;
  Residual form;
  bool relu;
  const void* c;                                 // [rows, period]
  const float *scale, *shift;                    // [period]
  const void* residual;                          // [rows, period] or null
  const float *residual_scale, *residual_shift;  // [period] or null
  void* y;                                       // [rows, period]
  uint8_t* mask;                                 // [rows, period/8] or null
  int64_t period;
};

struct BackwardReduceArgs {
  Dtype dtype;
  Gradient gradient;
  const void *dy, *c;                 // [rows, period]
  const uint8_t* mask;                // [rows, period/8] or null
  const float *mean, *scale, *shift;  // [period]
  const void* shortcut_c;             // [rows, period] or null
  const float* shortcut_mean;         // [period] or null
  float* partial;                     // [3, period], scratch
  double* sums;                       // [3, period]: += sum dz, sum dz*(c - mean), sum dz*(shortcut_c - shortcut_mean)
  int64_t period;
};

struct BackwardInputArgs {
  Dtype dtype;
  Gradient gradient;
  const void *dy, *c;          // [rows, period]
  const uint8_t* mask;         // [rows, period/8] or null
  const float *scale, *shift;  // [period]
  Coefficients main;
  const void* shortcut_c;  // [rows, period] or null
  Coefficients shortcut;
  void* dc;         // [rows, period]
  void* dresidual;  // [rows, period] or null: dz, or the shortcut's dc if shortcut_c is given
  int64_t period;
};

struct MaskArgs {
  Dtype dtype;
  const void* dy;       // [rows, period]
  const uint8_t* mask;  // [rows, period/8]
  void* dz;             // [rows, period]
  int64_t period;
};

struct Window {
  int64_t kernel_size, stride, padding;
  int64_t channels, height, width;  // of c
  int64_t out_height, out_width;    // of y
};

struct PoolForwardArgs {
  Dtype dtype;
  Window window;
  const void* c;               // [N, height, width, channels]
  const float *scale, *shift;  // [channels], padded to the vector width
  void* y;                     // [N, out_height, out_width, channels]
  uint8_t* indices;            // like y, or null
};

// The windows of one axis that contain a position: [first, last].
struct Covering {
  int64_t first, last;
};

struct PoolBackwardArgs {
  Dtype dtype;
  Window window;
  const Covering *rows, *columns;  // [height], [width]
  const void *dy, *c;
  const uint8_t* indices;
  const float* mean;  // [channels], padded; for the sums
  Coefficients main;  // padded; for dc
  void* dc;           // like c, or null: only the sums
  float* partial;     // [2, channels], padded, scratch
  double* sums;       // [2, channels], padded: += sum dz, sum dz*(c - mean)
};

constexpr int64_t kVectorsOfPanel = 2;  // of one position, or row of a weight, in a packed copy

// The rows of a tile of results: with kVectorsOfPanel vectors each they fill the registers.
constexpr int64_t rows_of_tile(int64_t width) { return width == 8 ? 6 : 14; }

constexpr int64_t kPackedIn = 128;  // input channels packed at once: whole tiles, few of the second cache's ways

// Positions of one row of dy, beside each other where their x is.
struct Stretch {
  const float* x;    // packed, of the first position
  int64_t position;  // of the first, in the piece
  int64_t positions;
};

// A piece of the weight gradient's sum: rows of dy, of N*height.out, whose copies stay in the cache. dw is added to.
struct ConvWeightArgs : ConvBackwardWeight {
  int64_t first_out, last_out, first_in, last_in, first_tap, last_tap;  // what of dw the call is for
  int64_t begin, end;                                                   // rows of dy
  int64_t x_begin, x_end;  // rows of x, of N*height.in, that they read, if the kernel has more than one
  float* packed_dy;        // scratch: panels of a vector for each position of the piece
  float* packed_x;         // scratch: panels of kVectorsOfPanel vectors for each position of the piece's x
  Stretch* stretches;      // [end - begin], scratch
};

// Copies a weight as panels of the columns of a product.
struct PackArgs {
  int64_t in_channels, out_channels;
  const void* weight;  // [out_channels, in_channels]
  float* packed;       // whole panels, in words of one float or two bfloat16
};

struct Conv1x1Args : Conv1x1Forward {
  Residual form;
  const float* packed_weight;
};

// By positions of dy.
struct Conv1x1InputArgs : ConvBackwardInput {
  const float* packed_weight;
};

// The convolutions of one dtype. A 1x1 convolution of bfloat16 sums over an even number of channels only.
struct Convolutions {
  void (*pack_weight)(const PackArgs&, int64_t begin, int64_t end);             // panels of input channels
  void (*pack_weight_transposed)(const PackArgs&, int64_t begin, int64_t end);  // panels of output channels
  void (*conv1x1_backward_input)(const Conv1x1InputArgs&, int64_t begin, int64_t end);
  void (*conv1x1_forward)(const Conv1x1Args&, int64_t begin, int64_t end);
  void (*conv_backward_weight)(const ConvWeightArgs&);
};

// One set of kernels, compiled for one instruction set. Each walks rows [begin, end): of `period` elements, or,
// for pooling, of y in the forward and of c in the backward.
struct Kernels {
  const char* name;
  int64_t width;  // floats a vector
  void (*sample_mean)(const SampleArgs&);
  void (*bn_stats)(const StatsArgs&, int64_t begin, int64_t end);
  void (*bn_add_relu_forward)(const ForwardArgs&, int64_t begin, int64_t end);
  void (*bn_add_relu_backward_reduce)(const BackwardReduceArgs&, int64_t begin, int64_t end);
  void (*bn_add_relu_backward_input)(const BackwardInputArgs&, int64_t begin, int64_t end);
  void (*relu_backward)(const MaskArgs&, int64_t begin, int64_t end);
  void (*bn_relu_maxpool_forward)(const PoolForwardArgs&, int64_t begin, int64_t end);
  void (*bn_relu_maxpool_backward)(const PoolBackwardArgs&, int64_t begin, int64_t end);
  Convolutions float32;
};

extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;

// The best set for this processor, at most what ATEN_CPU_CAPABILITY (torch's own switch) allows; null below AVX2.
const Kernels* kernels();

extern const Convolutions avx512_bf16_convolutions;

// The convolutions of a dtype. Null where the processor has no instructions for them; also where it has the tiles of
// AMX, because the library's convolutions use the tiles and are far faster.
const Convolutions* convolutions(Dtype dtype);

}  // namespace fusedres::cpu
