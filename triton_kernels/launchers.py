"""Every launcher, by the name of its raw op."""

from fusedres.triton_kernels.bn_add_relu_backward_input import bn_add_relu_backward_input
from fusedres.triton_kernels.bn_add_relu_backward_reduce import bn_add_relu_backward_reduce
from fusedres.triton_kernels.bn_add_relu_forward import bn_add_relu_forward
from fusedres.triton_kernels.bn_relu_maxpool import (
    bn_relu_maxpool_backward_input,
    bn_relu_maxpool_backward_reduce,
    bn_relu_maxpool_forward,
)
from fusedres.triton_kernels.bn_stats import bn_stats
from fusedres.triton_kernels.bn_vectors import bn_backward_coefficients, bn_scale_shift
from fusedres.triton_kernels.conv1x1_backward_input import conv1x1_backward_input
from fusedres.triton_kernels.conv1x1_backward_weight import conv1x1_backward_weight
from fusedres.triton_kernels.conv1x1_forward import conv1x1_forward
from fusedres.triton_kernels.conv1x1_gram_backward_input import conv1x1_gram_backward_input
from fusedres.triton_kernels.gram import gram
from fusedres.triton_kernels.gram_backward_coefficients import gram_backward_coefficients
from fusedres.triton_kernels.gram_output_stats import gram_output_stats
from fusedres.triton_kernels.relu_backward import relu_backward

__all__ = [
    "bn_add_relu_backward_input",
    "bn_add_relu_backward_reduce",
    "bn_add_relu_forward",
    "bn_backward_coefficients",
    "bn_relu_maxpool_backward_input",
    "bn_relu_maxpool_backward_reduce",
    "bn_relu_maxpool_forward",
    "bn_scale_shift",
    "bn_stats",
    "conv1x1_backward_input",
    "conv1x1_backward_weight",
    "conv1x1_forward",
    "conv1x1_gram_backward_input",
    "gram",
    "gram_backward_coefficients",
    "gram_output_stats",
    "relu_backward",
]
