"""Public functional operations over torch's own modules."""

from fusedres.nn.residual_block import ConvBN, residual_block, stem_block

__all__ = ["ConvBN", "residual_block", "stem_block"]
