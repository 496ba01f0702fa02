"""The numbers of convolutions, norms and poolings, in the types in which torch takes them.

torch takes Python's numbers, NumPy's scalars and tensors of one element, and for height and width one number or a list
of them. A recipe takes the first two, in tuples or lists; a tensor's value is not read here, for that would wait for
its device.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from fusedres.blocks.config import Size, Window


class UnusualNumberError(ValueError):
    """A number of a type that no recipe takes. args: its name and its type's: torch.compile traces no `__init__`."""

    def __str__(self) -> str:
        name, found = self.args
        return f"{name}: needs a number of Python or NumPy, found a {found}; set it to such a number"

    @property
    def code(self) -> str:
        """The reason code of a block that has it."""
        name, found = self.args
        return f"unusual_number:{name}, {found}"


def is_numpy_scalar(value: Any, kinds: str) -> bool:
    """Whether it is a scalar of NumPy of one of these kinds; NumPy itself need not be there."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic) and value.dtype.kind in kinds


def whole(value: Any, name: str) -> int:
    """The int that torch reads.

    Raises:
        UnusualNumberError: it is none of Python or NumPy.
    """
    if type(value) is int:
        return value
    if is_numpy_scalar(value, "iu"):
        return int(value)
    raise UnusualNumberError(name, type(value).__name__)


def real(value: Any, name: str) -> float:
    """The float that torch reads.

    Raises:
        UnusualNumberError: it is none of Python or NumPy.
    """
    if type(value) is float or type(value) is int:
        return value
    if is_numpy_scalar(value, "fiu"):
        return float(value)
    raise UnusualNumberError(name, type(value).__name__)


def pair(value: Any, name: str) -> Size:
    """The numbers for height and width that torch reads: one stands for both.

    Raises:
        UnusualNumberError: one of them is no int of Python or NumPy, or there are more than two.
    """
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    if isinstance(value, (tuple, list)):
        if not 1 <= len(value) <= 2:
            raise UnusualNumberError(name, type(value).__name__)
        return whole(value[0], name), whole(value[-1], name)
    number = whole(value, name)
    return number, number


def single(value: Any, name: str) -> int | None:
    """The one number of a square window's parameter, or None. Raises UnusualNumberError."""
    height, width = pair(value, name)
    return height if height == width else None


def square_window(pool: nn.MaxPool2d) -> Window | None:
    """The pooling's window; None where it is outside what `BnReluMaxpoolForward` serves.

    Raises:
        UnusualNumberError: one of its numbers is none that a recipe takes.
    """
    numbers = [single(getattr(pool, name), name) for name in Window._fields]
    # a flag of another type is left to torch
    if pool.ceil_mode is not False or pool.return_indices is not False:
        return None
    if None in numbers or single(pool.dilation, "dilation") != 1:
        return None
    window = Window(*numbers)  # type: ignore[arg-type]
    return window if 1 <= window.kernel_size <= 15 else None
