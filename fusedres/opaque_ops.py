"""Every raw op as an operator of torch, `torch.ops.fusedres.<op>`: what a compiler sees, and cannot see into.

    y, mask = torch.ops.fusedres.bn_add_relu_forward(c, scale, shift, residual, save_mask=True)

Schemas follow from the signatures of `RawOps`. A named tuple of vectors is a list of tensors; an operator may not
return an argument, so a result has only what is new: `bn_scale_shift` (invstd, scale, shift), and
`bn_backward_coefficients` (dweight, B, K). `backend`, by keyword, chooses as in `fusedres.dispatch`.
No operator here is differentiable by itself: blocks are, in `fusedres.opaque_blocks`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from fusedres import flops
from fusedres.backends.fake import FakeOps
from fusedres.dispatch import AUTO, dispatcher
from fusedres.raw_ops import RAW_OPS, BatchNormGrads, BatchNormVectors, Conv1x1Output, GramGrads, RawOps

NAMESPACE = "fusedres"
GIVEN_AWAY = ("reuse_c", "reuse_dy", "reuse_shortcut")
TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    BatchNormVectors: "Tensor[]",
    BatchNormGrads: "Tensor?[]",
    BatchNormGrads | None: "Tensor?[]?",
    bool: "bool",
    int: "SymInt",
    float: "float",
    tuple[int, int]: "SymInt[]",
}
# what of a result is new; the other fields are arguments
NEW_FIELDS: dict[Any, tuple[str, ...]] = {
    BatchNormVectors: ("invstd", "scale", "shift"),
    BatchNormGrads: ("dweight", "B", "K"),
    Conv1x1Output: Conv1x1Output._fields,
    GramGrads: GramGrads._fields,
}
TUPLES = {
    BatchNormVectors: BatchNormVectors,
    BatchNormGrads: BatchNormGrads,
    BatchNormGrads | None: BatchNormGrads,
}


def parameter_types(op: str) -> dict[str, Any]:
    """Names and types of the op's parameters, in order; an operator is given nothing away."""
    hints = get_type_hints(getattr(RawOps, op))
    return {name: type_ for name, type_ in hints.items() if name not in ("return", *GIVEN_AWAY)}


def result_types(op: str) -> tuple[str, ...]:
    """Schema types of what the operator returns."""
    result = get_type_hints(getattr(RawOps, op))["return"]
    if result in NEW_FIELDS:
        fields = get_type_hints(result)
        return tuple(TYPES[fields[name]] for name in NEW_FIELDS[result])
    return (TYPES[result],) if result is Tensor else tuple(TYPES[t] for t in get_args(result))


def schema(op: str) -> str:
    """The operator's schema, without its name: "(Tensor c, *, str backend='auto') -> (Tensor, Tensor)"."""
    defaults = inspect.signature(getattr(RawOps, op)).parameters
    parts = []
    for name, type_ in parameter_types(op).items():
        default = defaults[name].default
        parts.append(f"{TYPES[type_]} {name}" + ("" if default is inspect.Parameter.empty else f"={default}"))
    return f"({', '.join(parts)}, *, str backend='{AUTO}') -> ({', '.join(result_types(op))})"


def as_tuples(makers: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operator's arguments as the raw op has them: lists of vectors as named tuples."""
    return tuple(
        arg if maker is None or arg is None else maker(*arg) for maker, arg in zip(makers, args, strict=False)
    )


def new_parts(result: Any) -> Any:
    """The raw op's result as the operator returns it."""
    fields = NEW_FIELDS.get(type(result))
    return result if fields is None else tuple(getattr(result, name) for name in fields)


def apart(result: Any) -> Any:
    """The same tensors, copied where two share a storage, as sums of one merge do: an operator may not return such."""
    if isinstance(result, Tensor):
        return result
    seen: set[int] = set()
    parts = []
    for tensor in result:
        if tensor is not None:
            storage = tensor.untyped_storage().data_ptr()
            tensor = tensor.clone() if storage in seen else tensor
            seen.add(storage)
        parts.append(tensor)
    return tuple(parts)


def register(op: str) -> torch.library.CustomOpDef:
    makers = tuple(TUPLES.get(type_) for type_ in parameter_types(op).values())

    def implementation(*args: Any, backend: str = AUTO) -> Any:
        return apart(new_parts(getattr(dispatcher(backend), op)(*as_tuples(makers, args))))

    def fake(*args: Any, backend: str = AUTO) -> Any:
        return new_parts(getattr(FakeOps(), op)(*as_tuples(makers, args)))

    made = torch.library.custom_op(f"{NAMESPACE}::{op}", implementation, mutates_args=(), schema=schema(op))
    made.register_fake(fake)
    return made


OPAQUE_OPS: dict[str, Callable[..., Any]] = {op: register(op) for op in RAW_OPS}
flops.register(NAMESPACE, flops.RAW)
