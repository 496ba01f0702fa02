"""The checks of every raw op, and the cases that each is run on, from the families they are written in.

`CHECKS[op](ops, case)` raises AssertionError where `ops` is wrong; `cases_of(op)` gives the cases, `FORMS[op]` the
names of their forms, the richest first. "bn_layer" is no op but a whole layer of several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import conv1x1_cases
import conv1x1_checks
import conv3x3_checks
import raw_op_cases
import raw_op_checks

# (checks, cases) of each family
FAMILIES = (
    (raw_op_checks, raw_op_cases),
    (conv1x1_checks, conv1x1_cases),
    (conv3x3_checks, conv3x3_checks),
)
CHECKS: dict[str, Callable[[Any, Any], None]] = {
    op: check for checks, _ in FAMILIES for op, check in checks.CHECKS.items()
}
FORMS = {op: cases.FORMS[op] for checks, cases in FAMILIES for op in checks.CHECKS}
SHAPES = {op: cases.SHAPES for checks, cases in FAMILIES for op in checks.CHECKS}


def cases_of(op: str) -> Iterator[raw_op_cases.Case]:
    """Every case of one op, dtype and device still to be chosen with `dataclasses.replace`."""
    return next(cases.cases_of(op) for checks, cases in FAMILIES if op in checks.CHECKS)
