"""Inputs for the raw-op checks: which shapes, layouts, values and forms each op is tested on.

Every input lies inside a larger buffer of NaN, so that a kernel that reads past its tensor gives NaN and one
that writes past it is seen by `Inputs.assert_unchanged`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fusedres.ops.contract import (
    BatchNormGrads,
    BatchNormVectors,
    BnBackwardCoefficients,
    BnScaleShift,
    BnStats,
    accumulation_dtype,
)
from fusedres.ops.reference import REFERENCE

MARGIN = 64  # elements before and after each input
POOL = (3, 2, 1)  # kernel_size, stride, padding of the ResNet stem


@dataclass(frozen=True)
class Case:
    """One set of inputs. `form` selects the optional parts of the op, see `FORMS`."""

    id: str
    shape: tuple[int, int, int, int] = (2, 24, 5, 7)  # N, C, H, W
    layout: str = "channels_last"  # of every activation; "mixed": the first channels_last, the others NCHW
    mean_over_std: float = 0.5
    dy_mean: float = 0.0
    special: bool = False  # NaN, Inf and -Inf in c, residual and dy
    form: str = ""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.id}-{self.form}" if self.form else self.id


SHAPES = (
    Case("C1", (2, 1, 5, 7)),
    Case("C3", (2, 3, 5, 7)),
    Case("C8", (1, 8, 3, 3)),
    Case("C17", (3, 17, 4, 5)),
    Case("C24", (2, 24, 5, 7)),
    Case("C64", (2, 64, 6, 6)),
    Case("C130", (1, 130, 3, 5)),
    Case("P1", (1, 24, 1, 1)),
    Case("P2", (2, 17, 1, 1)),
    Case("P4", (4, 17, 1, 1)),
    Case("N0", (0, 24, 5, 7)),
    Case("rows8000", (5, 16, 40, 40)),
)
LAYOUTS = tuple(
    Case(layout, (2, channels, 5, 7), layout)
    for layout, channels in (
        ("nchw", 24),
        ("offset", 17),
        ("channel_slice", 17),
        ("space_slice", 24),
        ("expanded", 24),
        ("mixed", 24),
        ("padded_rows", 24),
    )
)
VALUES = (
    Case("mean0", (3, 24, 24, 24), mean_over_std=0.0),
    Case("mean_over_std30", (3, 24, 9, 9), mean_over_std=30.0),
    Case("mean_over_std1000", (3, 24, 9, 9), mean_over_std=1000.0),
    Case("dy_mean1", (3, 24, 9, 9), dy_mean=1.0),
    Case("nan_inf", (2, 24, 5, 7), special=True),
    Case("nan_inf_C17", (2, 17, 5, 7), special=True),
)

# The optional parts of each op; the first is the richest.
FORMS = {
    "bn_stats": ("",),
    "bn_scale_shift": ("affine", "half_weight", "weight_only", "bias_only", "plain"),
    "bn_add_relu_forward": (
        "projection_mask",
        "identity_mask",
        "mask",
        "projection",
        "identity",
        "activation",
        "identity_no_relu",
        "no_relu",
    ),
    "bn_add_relu_backward_reduce": (
        "projection_mask",
        "mask",
        "projection",
        "relu",
        "no_relu",
        "projection_no_relu",
    ),
    "bn_backward_coefficients": ("training", "frozen"),
    "bn_add_relu_backward_input": (
        "projection_mask",
        "projection_frozen_mask",
        "identity_mask",
        "identity_frozen_mask",
        "identity_no_relu",
        "mask",
        "projection",
        "identity",
        "relu",
        "relu_frozen",
        "no_relu",
    ),
    "relu_backward": ("",),
    "bn_layer": ("identity", "plain"),
    "bn_relu_maxpool_forward": ("3x3s2p1", "2x2s2p0", "3x3s1p1", "5x5s3p2"),
    "bn_relu_maxpool_backward_reduce": ("3x3s2p1", "2x2s2p0", "3x3s1p1", "5x5s3p2"),
    "bn_relu_maxpool_backward_input": ("3x3s2p1", "2x2s2p0", "3x3s1p1", "5x5s3p2", "3x3s2p1_frozen"),
    "conv_backward_weight": ("3x3s2", "3x3", "1x1", "1x1s2", "5x3", "groups"),
    "conv_backward_input": (
        "1x1_mask",
        "1x1_identity",
        "1x1",
        "1x1s2_identity",
        "3x3_mask",
        "3x3s2",
        "groups_identity",
    ),
}


def cases_of(op: str) -> Iterator[Case]:
    """Every case of one op, dtype and device still to be chosen with `dataclasses.replace`."""
    for case in SHAPES + LAYOUTS + VALUES:
        if op in ("bn_scale_shift", "bn_backward_coefficients") and case in LAYOUTS:
            continue
        if "maxpool" in op and min(case.shape[2:]) < 2:
            continue
        # eager BN refuses a single row in training, and NaN statistics leave nothing to compare; of two rows dc is 0
        # but for eps, and eager's error there is 3 in NCHW where it is 0.0007 in channels_last
        if op == "bn_layer" and (case.special or case.id in ("N0", "P1", "P2")):
            continue
        for form in FORMS[op]:
            yield replace(case, form=form)


@dataclass
class Inputs:
    """Makes the tensors of one case, deterministically, and remembers them."""

    case: Case
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (buffer, its bits when it was made)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(sum(map(ord, str(self.case))))
        self.count = 0

    @property
    def acc(self) -> torch.dtype:
        return accumulation_dtype(self.case.dtype)

    def random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def place(self, values: Tensor, strides: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Tensor:
        """`values` at these strides inside a buffer of NaN."""
        extent = (
            1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) if values.numel() else 0
        )
        buffer = torch.full((extent + 2 * MARGIN,), float("nan"), dtype=dtype, device=self.case.device)
        tensor = buffer.as_strided(values.shape, strides, MARGIN + offset)
        once = tuple(slice(1) if stride == 0 else slice(None) for stride in strides)
        tensor[once].copy_(values[once])
        self.buffers.append((buffer, bits(buffer).clone()))
        return tensor

    def vector(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.place(values, (1,), dtype or self.acc)

    def activation(
        self, shape: tuple[int, int, int, int], mean: float = 0.0, per_channel: bool = True
    ) -> Tensor:
        """[N, C, H, W] of standard deviation about 1 and about this mean, in the case's layout."""
        values = self.random(shape) + mean
        if per_channel:
            values = values * (
                0.5 + torch.rand(shape[1], 1, 1, generator=self.generator, dtype=torch.float64)
            )
        if self.case.special and values.numel() > 8:
            places = torch.randperm(values.numel(), generator=self.generator)[:6]
            bad = [float("nan"), float("inf"), float("-inf")] * 2
            values.view(-1)[places] = torch.tensor(bad, dtype=torch.float64)
        first, self.count = self.count == 0, self.count + 1
        if self.case.layout == "expanded" and not first:
            values = values[:, :, :1, :1].expand(shape)
        strides, offset = self._strides(shape, first)
        return self.place(values, strides, self.case.dtype, offset)

    def _strides(self, shape: tuple[int, int, int, int], first: bool) -> tuple[tuple[int, ...], int]:
        _, c, h, w = shape
        layout = self.case.layout
        if layout == "nchw" or (layout == "mixed" and not first):
            return (c * h * w, h * w, w, 1), 0
        if layout == "channel_slice":  # every other channel of a channels_last tensor
            return (2 * c * h * w, 2, 2 * c * w, 2 * c), 0
        if layout == "padded_rows":  # the first C of C + 3 channels
            return ((c + 3) * h * w, 1, (c + 3) * w, c + 3), 0
        if layout == "space_slice":  # every other column of a channels_last tensor
            return (c * h * 2 * w, 1, c * 2 * w, 2 * c), 0
        if layout == "expanded" and not first:
            return (c, 1, 0, 0), 0
        return (c * h * w, 1, c * w, c), 1 if layout == "offset" else 0

    def c(self) -> Tensor:
        """A raw convolution output; `first` is the one whose memory format the outputs take."""
        c = self.activation(self.case.shape, self.case.mean_over_std)
        self.first = c if self.count == 1 else self.first
        return c

    def dy(self, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        return self.activation(shape or self.case.shape, self.case.dy_mean, per_channel=False)

    def vectors(self, c: Tensor, frozen: bool = False) -> BatchNormVectors:
        """BN vectors of c (its finite values), with random weight and bias, one weight 0 and one negative."""
        channels = c.shape[1]
        finite = c.detach().double().cpu().nan_to_num(0.0, 0.0, 0.0)
        mean, var = REFERENCE(BnStats(finite))
        mean, var = mean.nan_to_num(0.0), var.nan_to_num(1.0)
        if frozen:
            mean, var = mean + 0.1 * self.random((channels,)), var * 1.3
        weight, bias = 1 + 0.3 * self.random((channels,)), 0.5 * self.random((channels,))
        weight[-1] *= -1
        weight[channels // 2] *= 0 if channels > 2 else 1
        vectors = REFERENCE(
            BnScaleShift(mean.to(self.acc), var.to(self.acc), weight.to(self.acc), bias.to(self.acc), 1e-5)
        )
        return BatchNormVectors(*(self.vector(v) for v in vectors))

    def grads(self, vectors: BatchNormVectors, rows: int, frozen: bool = False) -> BatchNormGrads:
        """Coefficients as a backward of `rows` rows would make them: A is the tensor `vectors.scale`."""
        channels = vectors.mean.shape[0]
        root = max(rows, 1) ** 0.5
        sums = [
            (root * (self.random((channels,)) + root * self.case.dy_mean * k)).to(self.acc) for k in (1, 0.1)
        ]
        host = BatchNormVectors(*(v.cpu() for v in vectors))
        made = REFERENCE(BnBackwardCoefficients(*sums, host, max(rows, 1), not frozen))
        own = BatchNormGrads(*(None if v is None else self.vector(v) for v in made))
        return own._replace(A=vectors.scale)

    def assert_unchanged(self, op: str) -> None:
        for buffer, before in self.buffers:
            assert torch.equal(bits(buffer), before), f"{op} wrote into an argument or beside it"


def bits(tensor: Tensor) -> Tensor:
    """The tensor's values as integers, so that NaN equals NaN."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(integer)
