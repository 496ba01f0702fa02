"""The running statistics of several norms, moved by one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops.native import library
from fusedres.ops.native.reasons import device_reason


def takes(
    means: list[Tensor],
    variances: list[Tensor],
    counters: list[Tensor],
    batch_means: list[Tensor],
    batch_variances: list[Tensor],
) -> bool:
    """Whether `move` moves these: float32 vectors and int64 counters of one device that it runs on."""
    device = means[0].device
    if not library.is_loaded() or (device.type != "cpu" and device_reason(device) is not None):
        return False
    is_writing = torch.is_inference_mode_enabled()  # into inference tensors, which torch refuses elsewhere
    if not is_writing and any(t.is_inference() for t in (*means, *variances, *counters)):
        return False
    for vectors in (means, variances, batch_means, batch_variances):
        for v in vectors:
            if v.dtype is not torch.float32 or v.device != device or v.dim() != 1 or not v.is_contiguous():
                return False
    return all(c.dtype is torch.int64 and c.device == device and c.numel() == 1 for c in counters)


def move(
    means: list[Tensor],
    variances: list[Tensor],
    counters: list[Tensor],
    batch_means: list[Tensor],
    batch_variances: list[Tensor],
    keep: list[float],
    weight: list[float],
    unbiased: list[float],
) -> None:
    """running = keep*running + weight*batch of several norms, by `unbiased` for the variances; each counter += 1.

    As torch's own batch_norm it tells autograd nothing of what it writes: an earlier call's graph may still run.
    """
    torch.ops.fusedres_native.bn_running_stats_(
        means, variances, counters, batch_means, batch_variances, keep, weight, unbiased
    )
