"""Trains a patched model and its unpatched twin side by side, and holds their losses and states together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accuracy import assert_same_float64
from torch import Tensor, nn

import fusedres


def assert_trained_alike(
    plain: nn.Module, fused: nn.Module, inputs: Tensor, loss_of: Callable[..., Tensor], rate: float = 0.01
) -> None:
    """One SGD step per input [steps, N, C, H, W]; every block of `fused` must have run fused."""
    losses = []
    for model in (plain, fused):
        optimizer = torch.optim.SGD(model.parameters(), rate, 0.9)
        for x in inputs:
            optimizer.zero_grad()
            loss = loss_of(model(x))
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    rows = fusedres.report(fused).matched
    assert rows and all(row.runs_as in ("separate", "gram") for row in rows), str(fusedres.report(fused))
    assert_same_float64(losses[1], losses[0], "loss")
    for (name, exact), actual in zip(plain.state_dict().items(), fused.state_dict().values(), strict=True):
        if exact.is_floating_point():
            assert_same_float64(actual, exact, name)
        else:
            assert torch.equal(actual, exact), name
