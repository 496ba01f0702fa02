"""Raw ops as the operators of torch that stand for them, checked by torch as they are called."""

import torch

from fusedres.opaque_ops import OPAQUE_OPS
from fusedres.raw_ops import BatchNormGrads, BatchNormVectors, Conv1x1Output


class Operators:
    """Raw ops through `torch.ops.fusedres`; the first call of `op` goes through `torch.library.opcheck` too."""

    def __init__(self, op, backend, *tests):
        self.op, self.backend, self.tests, self.checked = op, backend, tests, False

    def __getattr__(self, op):
        def call(*args):
            assert op in OPAQUE_OPS
            operator = getattr(torch.ops.fusedres, op).default
            given = tuple(list(a) if isinstance(a, BatchNormVectors | BatchNormGrads) else a for a in args)
            result = operator(*given, backend=self.backend)
            if op == self.op and not self.checked:
                self.checked = True
                torch.library.opcheck(operator, given, {"backend": self.backend}, test_utils=self.tests)
            if op == "bn_scale_shift":
                return BatchNormVectors(args[0], args[1], *result)
            if op == "bn_backward_coefficients":
                return BatchNormGrads(result[0], args[0], args[2].scale, *result[1:])
            return Conv1x1Output(*result) if op == "conv1x1_forward" else result

        return call
