"""The state machine of torch's BatchNorm2d: which statistics normalise, and how running ones move.

Semantics of torch.nn.modules.batchnorm._BatchNorm.forward, split around a fused kernel that hands back the batch's
mean and biased variance.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    """Training mode, or no running statistics to use instead."""
    return bn.training or (bn.running_mean is None and bn.running_var is None)


@torch.no_grad()
def update_running_stats(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, rows: int) -> None:
    """Moves the running statistics, as torch does after a forward in training mode.

    mean, var [C]: of the batch, var biased; rows: P. momentum None gives the cumulative average.
    """
    if not (bn.training and bn.track_running_stats) or bn.running_mean is None or bn.running_var is None:
        return
    momentum = bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    if momentum is None:
        momentum = 0.0
    unbiased = var * (rows / (rows - 1))
    for running, batch in ((bn.running_mean, mean), (bn.running_var, unbiased)):
        running.copy_(torch.lerp(running.to(batch.dtype), batch, momentum))
