// Compiled for AVX-512 with its products of bfloat16; see kernels.h on what may not be included here.
#include "vec_avx512.h"

#include "conv_kernels.h"
#include "product_kernels.h"

namespace fusedres::cpu {

const Products avx512_bf16_products = {
    ::pack_weight<BFloat16>,
    ::pack_weight_transposed<BFloat16>,
    ::conv_backward_input<BFloat16>,
    ::conv1x1_forward<BFloat16>,
    ::conv_backward_weight<BFloat16>,
};

}  // namespace fusedres::cpu
