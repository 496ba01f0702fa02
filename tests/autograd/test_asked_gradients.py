"""Backward makes the gradients that it is asked for, all of them and no other: as unpatched."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_same_float64
from asked_gradients import ASKED, chosen, collected, net, picture, split
from flops import Flops, flops_of
from same_model import images, pair
from torch._dynamo import compiled_autograd

import fusedres
from fusedres.ops.dispatch import opaque_backend
from fusedres.patching import call


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, exact in expected.items():
        if exact is None or actual[name] is None:
            assert actual[name] is exact, name
        else:
            assert_same_float64(actual[name], exact, str(name))


@pytest.mark.parametrize("asked", ASKED)
def test_gradients_asked_for_and_no_other(asked):
    found, counts = [], []
    for model in pair(net):
        with Flops() as counted:
            found.append(ASKED[asked](model))
        counts.append(counted.total)
    assert_same_gradients(found[1], found[0])
    assert counts[1] == counts[0]
    assert {row.runs_as for row in fusedres.report(model).matched} == {"separate"}


def test_a_pipelines_split_backward():
    """x's gradient first, then those of the weights. A block is one node: the second run passes through it again."""
    found, counts = [], []
    plain, fused = pair(net)
    for model in (plain, fused):
        with Flops() as counted:
            found.append(split(model))
        counts.append(counted.total)
    assert_same_gradients(found[1], found[0])
    forward = flops_of(fused, picture())
    with Flops() as whole:
        fused(picture()).sum().backward()
    assert counts[1] < 2 * whole.total - forward


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_node_called_by_itself_gives_every_gradient(where):
    _, block = pair(lambda: net()[1])
    x = images(2, 64, 6, 6).requires_grad_()
    y, other = block(x), torch.ones(1, requires_grad=True)
    expected = torch.autograd.grad(y.sum(), [x, *block.parameters()], retain_graph=True)
    found = []

    def call(_=None):
        found.extend(g for g in y.grad_fn.apply(torch.ones_like(y)) if g is not None)

    if where == "outside":
        call()
    else:
        product = other * 2
        product.register_hook(call)
        torch.autograd.grad(product, other)
    assert len(found) == len(expected)
    for actual, exact in zip(found, expected, strict=True):
        assert_same_float64(actual, exact)


# names of what is in the penalty
PENALTIES = {
    "x": [],
    "weights": ["weight"],
    "one": ["conv1.weight", "0.conv.weight"],
    "last-bias": ["bn3.bias"],
}


def assert_same_after_a_penalty(build, recipe, shape, targets):
    found = []
    for model in pair(build, recipe):
        x = images(*shape).requires_grad_()
        y = model(x)
        loss = (y * images(*y.shape)).sum()  # linear, lest the gradient be a function of y by itself
        gradients = torch.autograd.grad(loss, chosen(model, *targets) or [x], create_graph=True)
        sum(g.square().sum() for g in gradients).backward()
        found.append(collected(model, x))
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("recipe", ["separate", "gram"])
@pytest.mark.parametrize("penalised", PENALTIES)
def test_a_gradient_penalty_alone(penalised, recipe):
    """Whoever differentiates the gradient alone finds zeros where unpatched has zeros, and None where it has None."""
    assert_same_after_a_penalty(net, recipe, (2, 3, 12, 12), PENALTIES[penalised])


@pytest.mark.parametrize("penalised", ["x", "weights"])
@pytest.mark.parametrize(("part", "shape"), [(0, (2, 3, 8, 8)), (1, (2, 64, 4, 4)), (2, (2, 64, 4, 4))])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_gradient_penalty_of_one_part(part, shape, penalised, training):
    """By itself: nothing above passes zeros down to it, its stem or its pooled shortcut."""
    assert_same_after_a_penalty(lambda: net()[part].train(training), "separate", shape, PENALTIES[penalised])


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"]
)
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "batched"])
def test_the_layout_of_a_differentiable_gradient(graph, layout):
    """The gradient of a sum has no layout of its own: every gradient below takes that of the activations."""
    strides = []
    for model in pair(lambda: net()[1], "separate"):
        x = images(2, 64, 4, 4).contiguous(memory_format=layout).requires_grad_()
        y = model.to(memory_format=layout)(x)
        dy = torch.ones(1, dtype=y.dtype).expand(y.shape if graph else (2, *y.shape))
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=graph, is_grads_batched=not graph)
        strides.append((y.stride(), dx.stride()))
    assert strides[0] == strides[1]


@pytest.mark.parametrize("asked", ["x", "last-weight", "stem-norm", "backward-inputs", "frozen", "backward"])
def test_operators_that_a_graph_runs_eagerly(asked, monkeypatch):
    """A compiled graph that no compiler takes apart calls the blocks' operators, and the engine their formulas."""
    monkeypatch.setattr(call, "dispatcher", opaque_backend)
    found, counts = [], []
    for model in pair(net):
        with Flops() as counted:
            found.append(ASKED[asked](model))
        counts.append(counted.total)
    assert_same_gradients(found[1], found[0])
    assert counts[1] == counts[0] and "fusedres.residual_block_forward" in counted.operators


def test_under_compiled_autograd():
    """It runs backward from a graph of its own, with a stand-in for ctx: nothing that is wanted is missed."""
    plain, fused = pair(net)
    expected = ASKED["backward-inputs"](plain)
    with compiled_autograd._enable(lambda graph: graph):
        assert_same_gradients(ASKED["backward-inputs"](fused), expected)
