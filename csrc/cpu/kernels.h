// The CPU kernels' interface: plain structs and functions, without torch and without the C++ library. A file compiled
// for AVX-512 then leaves no inline function behind that the linker could pick for an older processor.
//
// Tensors are NHWC, dense: a flat array of P*C elements. `period` is a multiple of C and of the vector width. The flat
// array is walked in rows of `period` elements, and every channel vector is repeated to `period` elements.
#pragma once

#include <cstdint>

#include "../ops.h"
#include "grouped.h"

namespace fusedres::cpu {

using fusedres::Coefficients;  // the kernels' vectors are [period]
using fusedres::ConvAxis;
using fusedres::Dtype;  // float32 and bfloat16

enum class Residual { kNone, kIdentity, kProjection };

// Where dz comes from: dy; dy and the mask; dy and the sign of scale*c + shift.
enum class Gradient { kPlain, kMask, kSign };

struct CastArgs {
  Dtype from_dtype, to_dtype;
  const void* from;
  void* to;
};

struct SampleArgs {
  Dtype dtype;
  const void* c;  // [rows, channels]
  int64_t channels;
  const int64_t* rows;  // [samples], which rows are taken
  int64_t samples;
  float* mean;  // [channels]; from three samples on, without the smallest and the largest
};

struct StatsArgs {
  Dtype dtype;
  const void* c;       // [rows, period]
  const float* shift;  // [period], close to the mean; c - shift is summed
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

constexpr int64_t kVectorsOfPanel = 2;  // vectors of a position, or of a row of a weight, in a packed panel

// How many rows a tile of results has. With kVectorsOfPanel vectors a row, a tile fills the registers.
constexpr int64_t rows_of_tile(int64_t width) { return width == 8 ? 6 : 14; }

constexpr int64_t kPackedIn = 128;  // input channels packed at once: whole tiles, few of the second cache's ways

// Positions of one row of dy whose x lies side by side in the packed copy.
struct Stretch {
  const float* x;    // packed, at the first position
  int64_t position;  // number of the first position in the piece
  int64_t positions;
};

// A piece of the weight gradient's sum: rows of dy, of N*height.out, whose copies stay in the cache. The kernel adds
// the piece to dw.
struct ConvWeightArgs : ConvBackwardWeight {
  int64_t first_out, last_out, first_in, last_in, first_tap, last_tap;  // the part of dw that the call is for
  int64_t begin, end;                                                   // rows of dy
  int64_t x_begin, x_end;  // rows of x, of N*height.in, that rows of dy read, if the kernel has more than one row
  float* packed_dy;        // scratch: panels, each with a vector for each position of the piece
  float* packed_x;         // scratch: panels, each with kVectorsOfPanel vectors for each position of the piece's x
  Stretch* stretches;      // [end - begin], scratch
};

// Copies a weight as panels of the columns of a product.
struct PackArgs {
  int64_t in_channels, out_channels;
  const void* weight;  // [out_channels, in_channels]
  float* packed;       // whole panels, in words of one float or two bfloat16
};

// The rows of a product that are worked on together. They are copied: rows whose length is a multiple of a power of two
// would share a few lines of the first cache.
struct RowsOfProduct {
  float* copied;         // [kRowsOfProduct][pitch] words, scratch
  int64_t depth, pitch;  // depth: how many words are summed at once
};
constexpr int64_t kRowsOfProduct = 56;  // the weight passes once for so many

struct Conv1x1Args : ConvForward {
  Residual form;
  bool past_caches;  // whether y is written to memory itself: of float32, all of its vectors whole and aligned
  const float* packed_weight;
  RowsOfProduct rows_of_product;
};

// The kernel walks positions of dy.
struct Conv1x1InputArgs : ConvBackwardInput {
  bool past_caches;  // as above, of dx
  const float* packed_weight;
  RowsOfProduct rows_of_product;
};

// The convolutions of one dtype. A 1x1 convolution of bfloat16 sums over an even number of channels only.
struct Convolutions {
  void (*pack_weight)(const PackArgs&, int64_t begin, int64_t end);             // panels of input channels
  void (*pack_weight_transposed)(const PackArgs&, int64_t begin, int64_t end);  // panels of output channels
  void (*conv1x1_backward_input)(const Conv1x1InputArgs&, int64_t begin, int64_t end);
  void (*conv1x1_forward)(const Conv1x1Args&, int64_t begin, int64_t end);
  void (*conv_backward_weight)(const ConvWeightArgs&);
};

// The images of a 3x3 convolution without stride, cut into tiles of results: down x across of them in each image.
struct TiledImages {
  int64_t batch, height, width, channels;
  int64_t down, across;
};

struct TransformArgs {
  TiledImages images;
  const float* x;              // [batch, height, width, channels]
  const float *scale, *shift;  // [channels] or null: x itself, or relu(scale*x + shift)
  const float* zeros;          // [row]
  float* transformed;          // [planes][tiles][row], from the first tile of the call on
  int64_t plane, row;
  int64_t padded;  // channels that are written to a row, 0 beyond the last of x
};

struct WinogradWeightArgs {
  const float* weight;  // [out_channels, 3, 3, in_channels]
  int64_t in_channels, out_channels;
  int64_t first, last;  // the channels summed that the call is for
  float* transformed;   // [planes][panels][last - first][kPanelIn], from the first panel of the call on
  int64_t plane, panel;
};

// result[r, :] (+)= sum over k of a[r, k] * b[k, :] in each plane. All strides are in floats.
struct PlaneProducts {
  int64_t planes, rows, depth, vectors;  // kWidth columns each, of which a panel has kVectorsOfPanel
  const float* a;
  int64_t a_plane, a_row, a_depth;
  const float* b;
  int64_t b_plane, b_panel, b_depth;
  float* result;
  int64_t result_plane, result_row;
  bool add;
};

struct WinogradOutputArgs {
  TiledImages images;     // of y
  const float* products;  // [planes][tiles][products_row], from the first tile of the call and channel `first` on
  int64_t plane, products_row;
  int64_t first, last;                           // channels; first: a multiple of the vector width
  float* y;                                      // [batch, height, width, channels]
  const float *scale, *shift;                    // [channels] or null
  const float* residual;                         // like y, or null
  const float *residual_scale, *residual_shift;  // [channels] or null
  const uint8_t* mask;                           // one bit an element of residual, if scale is null; or null
  bool relu;
  double* moments;  // [2, row]: += sum y, sum y*y; or null
  int64_t row;      // channels, padded to the vector width
};

struct WinogradGradientArgs {
  const float* products;  // [copies][planes][output channel][products_row], from channels `first_out` and `first` on
  int64_t copies, copy, plane, products_row;
  int64_t in_channels, first_out, first, last;  // input channels [first, last)
  float* dw;                                    // [out_channels, 3, 3, in_channels]
};

// The transforms of one algorithm F(outputs x outputs, 3x3), float32. A range is of tiles, of panels of the results'
// channels, or of output channels.
struct WinogradKernels {
  int64_t outputs, planes;
  void (*transform_input)(const TransformArgs&, int64_t begin, int64_t end);
  void (*transform_output_gradient)(const TransformArgs&, int64_t begin, int64_t end);
  void (*transform_weight)(const WinogradWeightArgs&, int64_t begin, int64_t end);
  void (*transform_weight_reversed)(const WinogradWeightArgs&, int64_t begin, int64_t end);
  bool (*transform_output)(const WinogradOutputArgs&, int64_t begin, int64_t end);
  bool (*transform_weight_gradient)(const WinogradGradientArgs&, int64_t begin, int64_t end);
};

// One set of kernels, compiled for one instruction set. A kernel walks rows [begin, end) of `period` elements. Pooling
// walks rows of y in the forward and rows of c in the backward.
struct Kernels {
  const char* name;
  int64_t width;  // floats a vector
  void (*cast)(const CastArgs&, int64_t begin, int64_t end);
  void (*sample_mean)(const SampleArgs&);
  void (*bn_stats)(const StatsArgs&, int64_t begin, int64_t end);
  void (*bn_add_relu_forward)(const ForwardArgs&, int64_t begin, int64_t end);
  void (*bn_add_relu_backward_reduce)(const BackwardReduceArgs&, int64_t begin, int64_t end);
  void (*bn_add_relu_backward_input)(const BackwardInputArgs&, int64_t begin, int64_t end);
  void (*relu_backward)(const MaskArgs&, int64_t begin, int64_t end);
  void (*bn_relu_maxpool_forward)(const PoolForwardArgs&, int64_t begin, int64_t end);
  void (*bn_relu_maxpool_backward)(const PoolBackwardArgs&, int64_t begin, int64_t end);
  Convolutions float32;
  void (*multiply_planes)(const PlaneProducts&);
  WinogradKernels small, large;  // F(2x2, 3x3) and F(4x4, 3x3)
  GroupedKernels grouped;
};

extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;

// The best set for this processor that ATEN_CPU_CAPABILITY (torch's own switch) allows; null below AVX2.
const Kernels* kernels();

// Whether oneDNN multiplies wider vectors than these kernels: ATEN_CPU_CAPABILITY does not limit its convolutions.
bool library_is_wider();

extern const Convolutions avx512_bf16_convolutions;

// The convolutions of a dtype. Null where the processor has no instructions for them; also where it has the tiles of
// AMX, because the library's convolutions use the tiles and are far faster.
const Convolutions* convolutions(Dtype dtype);

}  // namespace fusedres::cpu
