"""Whole residual blocks on a GPU: every recipe and backend, by the rule of accuracy, repeatable, in a CUDA graph.

Without one `triton_interpreted_blocks.py` runs the same blocks, and `test_blocks.py` those of the CPU.
"""

import copy
from functools import partial

import pytest
import torch
from block_accuracy import assert_block_as_accurate_as_eager, by_recipe, inputs, read
from block_forms import FORMS, BlockForm, basic, bottleneck, one_step, patched, projection, ran_as, randomize
from triton_interpreted_blocks import CASES as TRAPS

from fusedres.models import Bottleneck
from fusedres.ops.dispatch import LOADERS, dispatcher

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# of ResNet-50's size: every product takes many steps and every tensor many tiles
LARGE = (
    BlockForm("bottleneck-1024", bottleneck(cin=1024, width=256), 1024, size=14),
    BlockForm(
        "bottleneck-1024-projection",
        lambda: randomize(Bottleneck(512, 256, 2, randomize(projection(512, 1024, 2)))),
        512,
        size=14,
    ),
)
LARGE_BASIC = BlockForm("basic-256", basic(cin=256, width=256), 256, size=14)
BY_NAME = {form.name: form for form in (*FORMS, *LARGE, LARGE_BASIC)}
OF_PROLOGUE = ("basic", "basic-projection", "basic-256")
OF_LARGE = [(recipe, form.name) for recipe in ("gram", "separate") for form in LARGE]
CASES = [
    pytest.param(recipe, name, backend, dtype, id=f"{recipe}-{name}-{backend}-{dtype}")
    for recipe, name in (*TRAPS, *OF_LARGE, *(("prologue", name) for name in OF_PROLOGUE))
    for backend in LOADERS
    for dtype in DTYPES
    if (recipe, dtype) != ("gram", "fp32")  # runs as `separate`
]


@pytest.mark.parametrize(("recipe", "name", "backend", "dtype"), CASES)
def test_block_is_as_accurate_as_eager(recipe, name, backend, dtype):
    block, x, dy = inputs(BY_NAME[name], DTYPES[dtype], DEVICE)
    config, units = read(block, x)
    run = partial(by_recipe, dispatcher(backend), recipe)
    assert_block_as_accurate_as_eager(run, config, x, units, dy)


@pytest.fixture
def deterministic_library(monkeypatch):
    """cuDNN's weight gradients may add in any order otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def dense(x):
    return x.clone().contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", LOADERS)
@pytest.mark.parametrize("recipe", ["separate", "gram"])
@pytest.mark.usefixtures("deterministic_library")
@pytest.mark.parametrize("name", ["bottleneck-projection", *(form.name for form in LARGE)])
def test_runs_are_bitwise_equal(name, recipe, backend):
    """Many of them: what reads a value while another thread writes it goes wrong now and then."""
    block, x, dy = inputs(BY_NAME[name], torch.bfloat16, DEVICE)
    run = lambda: one_step(patched(copy.deepcopy(block), recipe, backend), dense(x), dense(dy))  # noqa: E731
    first = run()
    for _ in range(20):
        again = run()
        assert torch.equal(first.y, again.y) and torch.equal(first.dx, again.dx)
        for parameter, gradient in first.gradients.items():
            assert torch.equal(gradient, again.gradients[parameter]), parameter


@pytest.mark.parametrize("backend", LOADERS)
@pytest.mark.parametrize("recipe", ["separate", "gram"])
@pytest.mark.usefixtures("deterministic_library")
def test_a_replayed_graph_gives_what_a_step_gives(recipe, backend):
    """A captured step, replayed on other values, is the step on those values bit by bit."""
    block, x, dy = inputs(BY_NAME["bottleneck"], torch.bfloat16, DEVICE)
    expected = patched(copy.deepcopy(block), recipe, backend)
    captured = patched(copy.deepcopy(block), recipe, backend)
    still, still_dy = torch.zeros_like(dense(x)).requires_grad_(), dense(dy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured(still).backward(still_dy)
    torch.cuda.current_stream().wait_stream(stream)
    captured.load_state_dict(block.state_dict())
    graph = torch.cuda.CUDAGraph()
    still.grad = None
    captured.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        y = captured(still)
        y.backward(still_dy)
    with torch.no_grad():
        still.copy_(x)
    graph.replay()
    step = one_step(expected, dense(x), dense(dy))
    assert ran_as(expected, recipe) and ran_as(captured, recipe)
    assert torch.equal(y, step.y) and torch.equal(still.grad, step.dx)
    for name, parameter in captured.named_parameters():
        assert torch.equal(parameter.grad, step.gradients[name]), name
    for name, buffer in captured.named_buffers():
        assert torch.equal(buffer, step.buffers[name]), name
