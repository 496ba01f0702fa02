"""The raw ops that a dispatcher is called with: seen by a test, or given other results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fusedres.ops.contract import RawOp
from fusedres.ops.dispatch import Dispatcher


def see_ops(monkeypatch: pytest.MonkeyPatch) -> list[RawOp]:
    """Every record from now on."""
    seen: list[RawOp] = []
    right = Dispatcher.__call__

    def call(self: Dispatcher, op: RawOp) -> Any:
        seen.append(op)
        return right(self, op)

    monkeypatch.setattr(Dispatcher, "__call__", call)
    return seen


def change_results(monkeypatch: pytest.MonkeyPatch, kind: type, change: Callable[[Any], Any]) -> None:
    """Every result of this op from now on is what `change` makes of it."""
    right = Dispatcher.__call__

    def call(self: Dispatcher, op: RawOp) -> Any:
        result = right(self, op)
        return change(result) if type(op) is kind else result

    monkeypatch.setattr(Dispatcher, "__call__", call)
