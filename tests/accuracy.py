"""The one rule of accuracy: error against float64, judged by the error of eager PyTorch itself.

    err = ||actual - exact||_2 / ||exact||_2       pass: err <= 2*err(eager) + 8*eps(dtype)

The eager result comes from the same layout, dtype and thread count as the one under test.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64; the plain norm of `actual` where exact is all zero."""
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    norm = exact.norm().item()
    return (actual - exact).norm().item() / (norm or 1.0)


def assert_as_accurate_as_eager(actual: Tensor, eager: Tensor, exact: Tensor, what: str = "") -> None:
    """The rule above. `actual` and `eager` in the tested dtype, `exact` in float64; NaN must stand where it does."""
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, eager {eager.dtype}"
    assert torch.equal(actual.isnan().cpu(), exact.isnan().cpu()), f"{what}: NaN at other places than exact"
    actual, eager, exact = (t.detach().nan_to_num(nan=0.0) for t in (actual, eager, exact))
    found, yardstick = relative_error(actual, exact), relative_error(eager, exact)
    limit = 2 * yardstick + 8 * torch.finfo(actual.dtype).eps
    assert found <= limit, f"{what}: error {found:.3e} exceeds {limit:.3e} (eager's own: {yardstick:.3e})"


def assert_same_float64(
    actual: Tensor, exact: Tensor, what: str = "", limit: float = 1e-10, eager: Tensor | None = None
) -> None:
    """Two float64 results of one function agree to `limit`, relative; or, where `exact` is better conditioned than
    eager's own result in float64, to twice the error of that."""
    assert actual.dtype == exact.dtype == torch.float64, f"{what}: {actual.dtype} and {exact.dtype}"
    found = relative_error(actual, exact)
    if eager is not None:
        limit = max(limit, 2 * relative_error(eager, exact))
    assert found <= limit, f"{what}: relative difference {found:.3e} exceeds {limit:.0e}"
