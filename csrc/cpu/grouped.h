// Grouped 3x3 convolutions with padding 1, in float32: ResNeXt's. Plain structs for the launchers and the kernels.
#pragma once

#include <cstdint>

#include "../ops.h"

namespace fusedres::cpu {

// As many channels leave a group as enter it.
struct Grouped3x3 {
  int64_t batch, channels, in_group;  // in_group: channels of a group
  ConvAxis height, width;
};

// y = conv(x), or relu(scale*conv(x) + shift)
struct Grouped3x3Forward : Grouped3x3 {
  const float* x;       // [N, height.in, width.in, channels]
  const float* weight;  // [channels, 3, 3, in_group]
  const float* scale;   // [channels], null with shift: no epilogue
  const float* shift;   // [channels]
  bool relu;
  float* y;  // [N, height.out, width.out, channels]
};

struct Grouped3x3BackwardInput : Grouped3x3 {  // of a convolution without stride
  const float* dy;                             // [N, H, W, channels]
  const float* weight;                         // [channels, 3, 3, in_group]
  float* dx;                                   // [N, H, W, channels]
};

struct Grouped3x3BackwardWeight : Grouped3x3 {
  const float* dy;  // [N, height.out, width.out, channels]
  const float* x;   // [N, height.in, width.in, channels]
  float* dw;        // [channels, 3, 3, in_group]
};

// What the kernels walk: `places` says where a vector's lanes find the inputs of their groups.
struct GroupedArgs : Grouped3x3 {
  const int32_t* places;  // [in_group][vector width], or null: a group fills whole vectors
  const float* x;
  int64_t rows_at_once;  // of the results, whose inputs stay in the second cache
};

struct GroupedForwardArgs : GroupedArgs {
  const float* packed;  // [vector of channels][9][in_group][vector width]
  const float *scale, *shift;
  bool relu;
  float* y;
};

struct GroupedWeightArgs : GroupedArgs {
  const float* dy;
  float* sums;  // [9][in_group][vector width], scratch
  float* dw;
};

struct GroupedKernels {
  void (*forward)(const GroupedForwardArgs&, int64_t begin, int64_t end);         // rows of y, of N*height.out
  void (*backward_weight)(const GroupedWeightArgs&, int64_t begin, int64_t end);  // vectors of channels
};

void grouped_conv3x3_forward(const Grouped3x3Forward& args);
void grouped_conv3x3_backward_input(const Grouped3x3BackwardInput& args);
void grouped_conv3x3_backward_weight(const Grouped3x3BackwardWeight& args);

// Whether channels and groups of these sizes fill this processor's vectors.
bool grouped_fits(int64_t channels, int64_t in_group);

}  // namespace fusedres::cpu
