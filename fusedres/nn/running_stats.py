"""How the running statistics of torch's BatchNorm2d move.

Semantics of torch.nn.modules.batchnorm._BatchNorm.forward, split around a fused kernel that hands back the batch's
mean and biased variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres.nn.attributes import tensor
from fusedres.nn.numbers import real
from fusedres.ops.native import running_stats as native

BUFFERS = "num_batches_tracked", "running_mean", "running_var"


class BatchStatistics(NamedTuple):
    """What one BN saw in a call: mean, var [C] of the batch, var biased; rows: P."""

    bn: nn.BatchNorm2d
    mean: Tensor
    var: Tensor
    rows: int


def update_running_stats(seen: Sequence[BatchStatistics]) -> None:
    """Moves the running statistics of every BN, as torch does after a forward in training mode.

    momentum None gives the cumulative average. To be called without grad mode. No buffer belongs to two
    of the BNs, or to one twice: they are moved together.
    """
    seen = [s for s in seen if s.bn.training and s.bn.track_running_stats]
    if not seen or moved_natively(seen):
        return
    counters, moving, means, variances = [], [], [], []
    for s in seen:
        counter, mean, var = (tensor(s.bn, name) for name in BUFFERS)
        if counter is not None:
            counters.append(counter)
        if mean is not None and var is not None:
            moving.append(s)
            means.append(mean)
            variances.append(var)
    if counters:
        torch._foreach_add_(counters, 1)
    if not moving:
        return
    momenta = [momentum(s.bn) for s in moving]
    running = means + variances
    batch = [s.mean for s in moving] + [s.var for s in moving]
    unbiased = [m * (s.rows / (s.rows - 1)) for m, s in zip(momenta, moving, strict=True)]
    new, old = momenta + unbiased, [1 - m for m in momenta] * 2
    with versions_kept(running):
        move(running, batch, new, old)


def moved_natively(seen: Sequence[BatchStatistics]) -> bool:
    """Moves all of it by the package's own kernel, in one launch; False, and nothing is done, where that takes none.

    A cumulative average depends on the counter's value, which the kernel does not read.
    """
    if torch.compiler.is_compiling():
        return False
    counters, means, variances = [], [], []
    for s in seen:
        counter, mean, var = (tensor(s.bn, name) for name in BUFFERS)
        if counter is None or mean is None or var is None or s.bn.momentum is None:
            return False
        counters.append(counter)
        means.append(mean)
        variances.append(var)
    batch_means, batch_variances = [s.mean for s in seen], [s.var for s in seen]
    if not native.takes(means, variances, counters, batch_means, batch_variances):
        return False
    momenta = [real(s.bn.momentum, "momentum") for s in seen]
    unbiased = [m * (s.rows / (s.rows - 1)) for m, s in zip(momenta, seen, strict=True)]
    native.move(
        means, variances, counters, batch_means, batch_variances, [1 - m for m in momenta], momenta, unbiased
    )
    return True


def versions_kept(running: list[Tensor]) -> AbstractContextManager[Any]:
    """Autograd is not told of what is written, as torch's own batch_norm tells it nothing: a graph of an earlier call
    that saved these tensors may still run backward. In a graph being compiled there is no telling."""
    if torch.compiler.is_compiling() or any(r.is_inference() for r in running):
        return nullcontext()
    return torch.autograd._unsafe_preserve_version_counter(tuple(running))


def move(running: list[Tensor], batch: list[Tensor], new: list[float], old: list[float]) -> None:
    """running = running*old + batch*new, one weight for each pair of tensors."""
    # not lerp, whose difference makes NaN of an infinite mean
    if all(r.dtype is b.dtype for r, b in zip(running, batch, strict=True)):
        torch._foreach_mul_(running, old)
        by_weight: dict[float, tuple[list[Tensor], list[Tensor]]] = {}  # few: BNs share momentum and size
        for r, b, weight in zip(running, batch, new, strict=True):
            moved, added = by_weight.setdefault(weight, ([], []))
            moved.append(r)
            added.append(b)
        for weight, (moved, added) in by_weight.items():  # NaN is a key too, and equals nothing
            torch._foreach_add_(moved, added, alpha=weight)
        return
    for r, b, keep, weight in zip(running, batch, old, new, strict=True):
        r.copy_(r.to(b.dtype) * keep + b * weight)


def momentum(bn: nn.BatchNorm2d) -> float:
    """The weight of the newest batch, its counter moved already."""
    if bn.momentum is not None:
        return real(bn.momentum, "momentum")
    return 0.0 if bn.num_batches_tracked is None else 1.0 / float(bn.num_batches_tracked)
