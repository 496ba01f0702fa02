"""Asserts the one rule of accuracy, `fusedres.ops.accuracy`."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops.accuracy import error_limit, relative_error


def assert_as_accurate_as_eager(actual: Tensor, eager: Tensor, exact: Tensor, what: str = "") -> None:
    """The rule above. `actual` and `eager` in the tested dtype, `exact` in float64; NaN must stand where it does."""
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, eager {eager.dtype}"
    assert torch.equal(actual.isnan().cpu(), exact.isnan().cpu()), f"{what}: NaN at other places than exact"
    actual, eager, exact = (t.detach().nan_to_num(nan=0.0) for t in (actual, eager, exact))
    found, yardstick = relative_error(actual, exact), relative_error(eager, exact)
    limit = error_limit(yardstick, actual.dtype)
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
