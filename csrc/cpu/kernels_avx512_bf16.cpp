// Compiled for AVX-512 with its products of bfloat16. kernels.h says which headers this file may not include.
#include "vec_avx512.h"

#include "conv1x1_kernels.h"
#include "conv1x1_packing.h"
#include "conv_weight_kernels.h"

namespace fusedres::cpu {

const Convolutions avx512_bf16_convolutions = {
    ::pack_weight<BFloat16>,     ::pack_weight_transposed<BFloat16>, ::conv1x1_backward_input<BFloat16>,
    ::conv1x1_forward<BFloat16>, ::conv_backward_weight<BFloat16>,
};

}  // namespace fusedres::cpu
