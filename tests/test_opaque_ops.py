"""Every operator of torch: torch's own checks of schema, fake and tracing, and the results of the raw op behind it."""

from dataclasses import replace

import conv1x1_cases
import conv1x1_checks
import pytest
import raw_op_cases
import raw_op_checks
import torch
from block_forms import FORMS, tensors_for
from opaque_operators import Operators
from raw_op_harness import poisoned_memory

from fusedres.backends import native
from fusedres.backends.fake import FakeOps
from fusedres.dispatch import AUTO
from fusedres.models import resnet18
from fusedres.nn import ConvBN
from fusedres.nn.residual_block import read_block, read_conv_bn
from fusedres.opaque_blocks import block_constants, unit_ints
from fusedres.opaque_ops import OPAQUE_OPS
from fusedres.raw_ops import RAW_OPS

BACKENDS = ["reference", *(["native"] if native.is_built() else [])]
CHECKS = {
    **{op: (check, raw_op_cases) for op, check in raw_op_checks.CHECKS.items() if op != "bn_layer"},
    **{op: (check, conv1x1_cases) for op, check in conv1x1_checks.CHECKS.items()},
}
EVERY_FORM = [
    (op, replace(cases.SHAPES[0], id="base", shape=(2, 24, 5, 7), form=form))
    for op, (_, cases) in CHECKS.items()
    for form in cases.FORMS[op]
]
# where fakes could differ: one channel, and layouts that backends do not take
ODD = ("C1", "nchw", "mixed")
STRIDES = [
    (op, case)
    for op, (_, cases) in CHECKS.items()
    if op not in ("bn_scale_shift", "bn_backward_coefficients")
    for case in cases.cases_of(op)
    if case.form == cases.FORMS[op][0] and case.id in ODD
]


def test_every_raw_op_is_an_operator():
    assert set(OPAQUE_OPS) == set(RAW_OPS) == set(CHECKS)


def ids(cases):
    return [pytest.param(op, case, id=f"{op}-{case}") for op, case in cases]


@pytest.mark.parametrize(("op", "case"), ids(EVERY_FORM))
def test_schema_and_fake_of_every_form(op, case):
    """And, once an op, what AOTAutograd makes of it with symbolic shapes."""
    first = case.form == CHECKS[op][1].FORMS[op][0]
    more = ("test_autograd_registration", "test_aot_dispatch_dynamic") if first else ()
    operators = Operators(op, AUTO, "test_schema", "test_faketensor", *more)
    CHECKS[op][0](operators, case)
    assert operators.checked


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "case"), ids(STRIDES))
def test_fakes_have_the_strides_of_every_backend(op, case, backend):
    operators = Operators(op, backend, "test_faketensor")
    CHECKS[op][0](operators, case)
    assert operators.checked


def test_a_fake_of_another_memory_format_is_seen(monkeypatch):
    contiguous = lambda self, c, *rest: (torch.empty(c.shape, dtype=c.dtype), None)  # noqa: E731
    monkeypatch.setattr(FakeOps, "bn_add_relu_forward", contiguous)
    c, v = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last), torch.ones(8)
    with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError, match=r"[Ss]tride"):
        torch.library.opcheck(torch.ops.fusedres.bn_add_relu_forward.default, (c, v, v))


def block_arguments(form, recipe, dtype):
    """Arguments of `residual_block_forward` for a block of this form; the output channels are its last weight's."""
    block = form.build().to(dtype).to(memory_format=torch.channels_last)
    x, _ = tensors_for(form, block, dtype)
    main = [
        ConvBN(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"), True)
        for i in (1, 2, 3)
        if hasattr(block, f"conv{i}")
    ]
    shortcut = None if block.downsample is None else ConvBN(*block.downsample, False)
    data = read_block(x.requires_grad_(), main, shortcut, shortcut is None and block.residual)
    constants = block_constants(data.config, data.tensors, recipe, AUTO)
    given = [t for unit in data.tensors for t in unit if t is not None]
    return x, None, given, *constants


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("separate", "bottleneck-no-affine"),
        ("gram", "bottleneck-projection-conv-bias"),
    ],
)
def test_block_operators(recipe, name):
    """Forward by opcheck, gradients included; backward by itself too, for every gradient and for some."""
    (form,) = [form for form in FORMS if form.name == name]
    args = block_arguments(form, recipe, torch.float64)
    forward = torch.ops.fusedres.residual_block_forward.default
    torch.library.opcheck(forward, (*args, True))
    torch.library.opcheck(forward, (*args, False), test_utils=("test_schema", "test_faketensor"))
    x, _, given, present, units, *constants = args
    with torch.no_grad():
        y, *saved = forward(*args, True)
    parameters = [present[i + k] for i in range(0, len(present), 6) for k in range(4)]
    for needs in (
        [True, False, *parameters],
        [False, False, *(p and i % 3 > 0 for i, p in enumerate(parameters))],
    ):
        backward = (torch.randn_like(y), x, given, saved, needs, True, present, units, *constants)
        detached = [[t.detach() for t in a] if a is given else a for a in backward]
        detached[1] = x.detach()
        torch.library.opcheck(
            torch.ops.fusedres.residual_block_backward.default,
            tuple(detached),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("recipe", ["separate", "gram"])
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("name", ["bottleneck-no-affine", "bottleneck-projection-conv-bias"])
def test_a_block_operator_writes_all_that_it_returns(name, save, recipe):
    (form,) = [form for form in FORMS if form.name == name]
    args = block_arguments(form, recipe, torch.float64)
    with torch.no_grad(), poisoned_memory():
        outputs = torch.ops.fusedres.residual_block_forward(*args, save)
    assert all(torch.isfinite(t).all() for t in outputs)


def test_stem_operators():
    model = resnet18(4).double()
    x = torch.randn(2, 3, 12, 10, dtype=torch.float64, requires_grad=True)
    config, tensors = read_conv_bn(ConvBN(model.conv1, model.bn1, True))
    given = [t for t in tensors if t is not None]
    present = [t is not None for t in tensors]
    constants = (present, unit_ints(config), config.eps, [3, 2, 1], AUTO)
    torch.library.opcheck(torch.ops.fusedres.stem_forward.default, (x, given, *constants))
    with torch.no_grad(), poisoned_memory():
        outputs = torch.ops.fusedres.stem_forward(x, given, *constants)
    assert all(torch.isfinite(t).all() for t in outputs)
