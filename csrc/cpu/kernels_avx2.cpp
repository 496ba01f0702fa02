// Compiled with the flags of AVX2. kernels.h says which headers this file may not include.
#include "vec_avx2.h"

#include "bn_kernels.h"
#include "cast_kernels.h"
#include "conv1x1_kernels.h"
#include "conv1x1_packing.h"
#include "conv_weight_kernels.h"
#include "grouped_kernels.h"
#include "pool_kernels.h"
#include "winograd_kernels.h"

namespace fusedres::cpu {

const Kernels avx2_kernels = {
    "avx2",
    kWidth,
    ::cast,
    ::sample_mean,
    ::bn_stats,
    ::bn_add_relu_forward,
    ::bn_add_relu_backward_reduce,
    ::bn_add_relu_backward_input,
    ::relu_backward,
    ::bn_relu_maxpool_forward,
    ::bn_relu_maxpool_backward,
    {::pack_weight<float>, ::pack_weight_transposed<float>, ::conv1x1_backward_input<float>, ::conv1x1_forward<float>,
     ::conv_backward_weight<float>},
    ::multiply_planes,
    winograd_of<SmallTile>(),
    winograd_of<LargeTile>(),
    {::grouped_forward, ::grouped_backward_weight},
};

}  // namespace fusedres::cpu
