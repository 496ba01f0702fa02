"""What every raw-op check shares: a guarded run of the op, the rule of accuracy, packed masks, yardsticks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager, assert_same_float64
from raw_op_cases import Inputs, bits
from torch import Tensor

from fusedres.ops.contract import RawOp, op_name
from fusedres.ops.fake import FAKE


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within, torch.empty gives NaN (integers: their largest value)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "... does not have a deterministic implementation"
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for value in values for t in tensors(value)] if isinstance(values, tuple) else []


def run(ops: Any, inputs: Inputs, record: RawOp) -> Any:
    """The op: twice and bitwise equal, in poisoned memory, pure, with fresh outputs that are like the fake's."""
    op = op_name(type(record))
    with poisoned_memory():
        result, again = (ops(record) for _ in range(2))
    for one, two in zip(tensors(result), tensors(again), strict=True):
        assert torch.equal(bits(one.contiguous()), bits(two.contiguous())), f"{op}: two runs differ"
    inputs.assert_unchanged(op)
    assert_like_fake(record, result)
    everything = tensors(record) + tensors(result)
    activations = [t for t in tensors(result) if t.dim() == 4 and t.numel()]
    for y in activations:
        shared = [t for t in everything if t is not y and storage(t) == storage(y)]
        assert not shared, f"{op}: an output shares storage with another tensor"
    for y in activations[:1]:
        expected = formats(inputs.first)
        assert formats(y) & expected or not expected, f"{op}: memory format changed"
    return result


def assert_like_fake(record: RawOp, result: Any) -> None:
    """Shapes, dtypes, devices and strides are those of the fake, and so are the places of None."""
    op, fake = op_name(type(record)), FAKE(record)
    assert present(result) == present(fake), f"{op}: the fake has other parts"
    for place, (real, made) in enumerate(zip(tensors(result), tensors(fake), strict=True)):
        found, expected = ((t.dtype, t.shape, t.device, strides(t)) for t in (real, made))
        assert found == expected, f"{op}, result {place} is {found}, of the fake {expected}"


def present(result: Any) -> Any:
    """For each part of a result, whether it is there."""
    return tuple(present(part) for part in result) if isinstance(result, tuple) else result is not None


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Of dimensions where they count; no element is reached by others."""
    return tuple(s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1 and tensor.numel())


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def formats(tensor: Tensor) -> set[torch.memory_format]:
    both = (torch.channels_last, torch.contiguous_format)
    return {f for f in both if tensor.is_contiguous(memory_format=f)}


def assert_accurate(actual: Tensor, eager: Tensor, exact: Tensor, what: str) -> None:
    """The rule of `accuracy` on the finite values; NaN and Inf stand exactly where they do in `exact`."""
    infinite = exact.isinf()
    assert torch.equal(actual.isnan(), exact.isnan()), f"{what}: NaN at other places than exact"
    assert torch.equal(actual.isinf(), infinite), f"{what}: Inf at other places than exact"
    assert torch.equal(actual[infinite].sign().double(), exact[infinite].sign()), f"{what}: sign of Inf"
    finite = exact.isfinite()
    actual, eager, exact = (torch.where(finite, t, 0) for t in (actual, eager, exact))
    if actual.dtype == torch.float64:  # there eager is the exact value itself
        assert_same_float64(actual, exact, what)
    else:
        assert_as_accurate_as_eager(actual, eager, exact, what)


def unpack(mask: Tensor, like: Tensor) -> Tensor:
    """Packed bits -> boolean with the logical shape of `like`; written apart from the backends."""
    assert mask.dtype == torch.uint8 and mask.shape == (-(-like.numel() // 8),), (
        f"mask {mask.shape} {mask.dtype}"
    )
    n, c, h, w = like.shape
    flat = torch.stack([mask >> i & 1 for i in range(8)], 1).flatten()[: like.numel()]
    return flat.bool().view(n, h, w, c).permute(0, 3, 1, 2)


def pack(keep: Tensor, inputs: Inputs) -> Tensor:
    """The inverse, placed among poisoned memory."""
    flat = keep.permute(0, 2, 3, 1).flatten().to(torch.int64).cpu()
    flat = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    packed = (flat << torch.arange(8)).sum(1).to(torch.uint8)
    buffer = torch.full((packed.numel() + 64,), 0xA5, dtype=torch.uint8, device=inputs.case.device)
    buffer[32 : 32 + packed.numel()] = packed
    inputs.buffers.append((buffer, buffer.clone()))
    return buffer[32 : 32 + packed.numel()]


def row(vector: Tensor) -> Tensor:
    return vector.double()[:, None, None]


def eager_affine(c: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale*c + shift as an eager BN in eval mode computes and rounds it."""
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    # F.batch_norm of torch 2.10 refuses eps=0
    return torch.batch_norm(c, scale, shift, zero, one, False, 0.0, 0.0, torch.backends.cudnn.enabled)


def assert_mask_of(mask: Tensor, y: Tensor) -> None:
    assert torch.equal(unpack(mask, y), ~(y <= 0)), "mask is not `not (y <= 0)` of the returned y"
    assert y.numel() % 8 == 0 or mask[-1] >> y.numel() % 8 == 0, "bits past the last element are not 0"


def eager_batch_norm_backward(dz: Tensor, c: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """`sum dz` and `sum dz*(c - mean)` as eager BN's backward forms them (weight and invstd 1)."""
    one = torch.ones_like(mean)
    _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        dz, c, one, None, None, mean, one, True, 1e-5, [False, True, True]
    )
    return dbias, dweight


def assert_sums(found: tuple[Tensor, Tensor], dz: Tensor, dz64: Tensor, c: Tensor, mean: Tensor) -> None:
    """The two channel sums against float64; dz is what eager has, dz64 exact."""
    if dz.numel() == 0:  # eager's kernel divides by the number of rows
        assert all(torch.equal(s, torch.zeros_like(mean)) for s in found), "sums over no rows are not 0"
        return
    exact = dz64.sum((0, 2, 3)), (dz64 * (c.double() - row(mean))).sum((0, 2, 3))
    eager = eager_batch_norm_backward(dz, c, mean)
    for what, a, e, x in zip(("sum_dz", "sum_dz_centered"), found, eager, exact, strict=True):
        assert a.dtype == mean.dtype
        assert_accurate(a, e, x, what)


def assert_input_gradient(actual: Tensor, dz: Tensor, dz64: Tensor, c: Tensor, grads: Any, what: str) -> None:
    """`A*dz + B*c + K`; the yardstick is the same expression, operation by operation."""
    exact, eager = row(grads.A) * dz64, grads.A[:, None, None] * dz
    if grads.B is not None:
        exact = exact + (row(grads.B) * c.double() + row(grads.K))
        eager = eager + (grads.B[:, None, None] * c + grads.K[:, None, None])
    assert actual.dtype == c.dtype
    assert_accurate(actual, eager.to(c.dtype), exact, what)
