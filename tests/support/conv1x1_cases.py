"""Inputs for the checks of the fused 1x1 convolutions and the Gram product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from raw_op_cases import Case, Inputs
from torch import Tensor

from fusedres.ops.contract import BatchNormVectors, BnScaleShift, BnStats
from fusedres.ops.reference import REFERENCE


@dataclass(frozen=True)
class ConvCase(Case):
    """`shape` is that of the convolution's input, [N, Cin, H, W]."""

    cout: int = 40
    bias_before: float = 0.0  # of the BN whose ReLU makes the activation: its mean over its deviation
    zero_gamma: bool = False  # of the BN after the convolution


SHAPES = (
    ConvCase("C3to17", (2, 3, 5, 7), cout=17),
    ConvCase("C17to24", (3, 17, 4, 5), cout=24),
    ConvCase("C24to8", (1, 24, 3, 3), cout=8),
    ConvCase("C40to136", (1, 40, 6, 7), cout=136),
    ConvCase("C130to33", (1, 130, 3, 5), cout=33),
    ConvCase("C136to40", (1, 136, 3, 5), cout=40),
    ConvCase("P1", (1, 24, 1, 1)),
    ConvCase("P127", (1, 16, 1, 127)),
    ConvCase("P128", (2, 16, 8, 8)),
    ConvCase("P129", (1, 16, 3, 43)),
    ConvCase("P1100", (2, 16, 22, 25), cout=24),
    ConvCase("N0", (0, 24, 5, 7)),
)
LAYOUTS = tuple(
    ConvCase(layout, (2, 24, 5, 7), layout)
    for layout in ("offset", "nchw", "mixed", "expanded", "padded_rows")
)
VALUES = (
    ConvCase("bias5", (3, 24, 9, 9), bias_before=5.0),
    ConvCase("bias30", (3, 24, 9, 9), bias_before=30.0),
    ConvCase("bias1000", (3, 24, 9, 9), bias_before=1000.0),
    ConvCase("dy_mean1", (3, 24, 9, 9), dy_mean=1.0),
    ConvCase("dy_mean1_P1100", (2, 16, 22, 25), cout=24, dy_mean=1.0),
    ConvCase("dy_mean1_bias30", (3, 24, 9, 9), dy_mean=1.0, bias_before=30.0),
    ConvCase("dy_mean1_bias1000", (3, 24, 9, 9), dy_mean=1.0, bias_before=1000.0),
    ConvCase("zero_gamma", (2, 24, 5, 7), zero_gamma=True),
    ConvCase("nan_inf", (2, 24, 5, 7), special=True),
    ConvCase("nan_inf_C17", (2, 17, 5, 7), cout=33, special=True),
)

# The optional parts of each op; the first is the richest.
FORMS = {
    "conv1x1_forward": (
        "prologue_projection_mask",
        "prologue_identity_mask",
        "prologue_mask",
        "prologue_stats",
        "bias_stats",
        "stride2_stats",
        "stride2_prologue_bias_identity",
        "projection",
        "identity_no_relu",
        "affine",
        "raw",
    ),
    "gram": ("",),
    "gram_output_stats": ("bias", "plain"),
    "gram_backward_coefficients": ("training", "frozen_bias", "frozen"),
    "conv1x1_backward_weight": ("mask_center", "mask", "center"),
    "conv1x1_gram_backward_input": ("training_mask", "frozen_mask", "training", "frozen"),
    "conv1x1_backward_input": ("identity_mask", "identity", "relu", "no_relu", "frozen_identity_mask"),
}


# of weights and moments: activations, with two rows at least, are only what these are made from
ON_WEIGHTS = ("gram_output_stats", "gram_backward_coefficients")


def cases_of(op: str) -> Iterator[ConvCase]:
    """Every case of one op, dtype and device still to be chosen with `dataclasses.replace`."""
    for case in SHAPES + LAYOUTS + VALUES:
        if op in ON_WEIGHTS and (case in LAYOUTS or case.id in ("P1", "N0")):
            continue
        for form in FORMS[op]:
            yield replace(case, form=form)


def weight_of(inputs: Inputs, case: ConvCase, kernel: int = 1) -> Tensor:
    """[Cout, Cin, kernel, kernel], scaled so that an output's deviation is near its input's."""
    cin = case.shape[1]
    values = inputs.random((case.cout, cin, kernel, kernel)) / (kernel * cin**0.5)
    return inputs.place(values, (kernel**2 * cin, 1, kernel * cin, cin), case.dtype)


def vectors_before(inputs: Inputs, c: Tensor, case: ConvCase) -> BatchNormVectors:
    """BN vectors of c (its finite values) with bias `bias_before` and more, one weight 0 and one negative."""
    channels = c.shape[1]
    finite = c.detach().double().cpu().nan_to_num(0.0, 0.0, 0.0)
    mean, var = (t.nan_to_num(1.0).to(inputs.acc) for t in REFERENCE(BnStats(finite)))
    weight, bias = 1 + 0.3 * inputs.random((channels,)), case.bias_before + 0.5 * inputs.random((channels,))
    weight[-1] *= -1
    weight[channels // 2] = 0
    made = REFERENCE(BnScaleShift(mean, var, weight, bias, 1e-5))
    return BatchNormVectors(*(inputs.vector(v) for v in made))


def as_rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # [N, C, H, W] -> [P, C]


def as_image(x: Tensor, like: Tensor) -> Tensor:
    n, _, h, w = like.shape
    return x.reshape(n, h, w, x.shape[1]).permute(0, 3, 1, 2)  # [P, C] -> [N, C, H, W]
