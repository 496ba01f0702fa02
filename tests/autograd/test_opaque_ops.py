"""Blocks and stem as operators of torch: torch's own checks of schema, fake and tracing; and the fake of each op."""

from dataclasses import replace

import pytest
import torch
from block_forms import FORMS as BLOCK_FORMS
from block_forms import tensors_for
from every_raw_op import CHECKS, FORMS, SHAPES
from raw_op_harness import assert_like_fake, poisoned_memory
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fusedres.autograd.operator import block_constants
from fusedres.models import resnet18
from fusedres.nn import ConvBN
from fusedres.nn.numbers import square_window
from fusedres.nn.residual_block import read_block
from fusedres.ops import fake
from fusedres.ops.contract import RAW_OPS, BnAddReluForward, op_name
from fusedres.ops.dispatch import AUTO
from fusedres.ops.reference import REFERENCE

EVERY_FORM = [
    pytest.param(op, replace(SHAPES[op][0], id="base", shape=(2, 24, 5, 7), form=form), id=f"{op}-{form}")
    for op in RAW_OPS
    for form in FORMS[op]
]


def test_every_raw_op_is_checked():
    assert set(RAW_OPS) == set(CHECKS) - {"bn_layer"}


def with_tensors(value, change):
    """An argument or result with each of its tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        items = [with_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


class Traced:
    """The reference; for each call of one op, its fake on fake tensors of symbolic shapes is like the result."""

    def __init__(self, op):
        self.op, self.checked = op, False

    def __call__(self, op):
        result = REFERENCE(op)
        if op_name(type(op)) == self.op:
            self.checked = True
            mode = FakeTensorMode(shape_env=ShapeEnv())
            symbolic = with_tensors(op, mode.from_tensor)
            with mode:
                made = fake.FAKE(symbolic)
            concrete = with_tensors(
                made,
                lambda t: torch.empty_strided(
                    tuple(map(int, t.shape)), tuple(map(int, t.stride())), dtype=t.dtype
                ),
            )
            assert_like_fake(op, concrete)
        return result


@pytest.mark.no_cover  # of torch's symbolic shapes, which takes most of the time
@pytest.mark.parametrize(("op", "case"), EVERY_FORM)
def test_fake_of_symbolic_shapes(op, case):
    ops = Traced(op)
    CHECKS[op](ops, case)
    assert ops.checked


def test_a_fake_of_another_memory_format_is_seen(monkeypatch):
    contiguous = lambda op: (torch.empty(op.c.shape, dtype=op.c.dtype), None)  # noqa: E731
    monkeypatch.setitem(fake.FUNCTIONS, BnAddReluForward, contiguous)
    c, v = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last), torch.ones(8)
    op = BnAddReluForward(c, v, v)
    with pytest.raises(AssertionError, match="bn_add_relu_forward, result 0 is"):
        assert_like_fake(op, REFERENCE(op))


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
    (form,) = [form for form in BLOCK_FORMS if form.name == name]
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
    (form,) = [form for form in BLOCK_FORMS if form.name == name]
    args = block_arguments(form, recipe, torch.float64)
    with torch.no_grad(), poisoned_memory():
        outputs = torch.ops.fusedres.residual_block_forward(*args, save)
    assert all(torch.isfinite(t).all() for t in outputs)


def test_the_operators_of_a_stem():
    model = resnet18(4).double()
    x = torch.randn(2, 3, 12, 10, dtype=torch.float64, requires_grad=True)
    data = read_block(x, [ConvBN(model.conv1, model.bn1, True)], None, False, square_window(model.maxpool))
    constants = block_constants(data.config, data.tensors, "separate", AUTO)
    given = [t for t in data.tensors[0] if t is not None]
    forward = torch.ops.fusedres.residual_block_forward.default
    torch.library.opcheck(forward, (x, None, given, *constants, True))
    torch.library.opcheck(
        forward, (x, None, given, *constants, False), test_utils=("test_schema", "test_faketensor")
    )
    for save in (True, False):
        with torch.no_grad(), poisoned_memory():
            outputs = forward(x, None, given, *constants, save)
        assert all(torch.isfinite(t).all() for t in outputs)
