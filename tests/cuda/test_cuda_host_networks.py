"""Whole networks of bottlenecks, and of basic blocks, on the CUDA kernels, forward and backward, without Triton: the
native backend is the host build, and what that does not have is torch's.
"""

import copy
from functools import partial

import cuda_host_backend
import cuda_host_build
import pytest
import torch
from block_accuracy import (
    PARAMETERS,
    assert_block_as_accurate_as_eager,
    network_by_recipe,
    read,
)
from block_forms import one_step, patched, projection, ran_as, randomize
from cuda_host_ops import HostCudaOps
from masked_blocks import Network
from torch import nn
from triton_harness import traced
from triton_interpreted_blocks import BN, LIBRARY, SERVED

from fusedres.models import BasicBlock, Bottleneck
from fusedres.ops import dispatch
from fusedres.ops.contract import RAW_OPS
from fusedres.ops.dispatch import Dispatcher
from fusedres.ops.reference import REFERENCE

pytestmark = pytest.mark.skipif(cuda_host_build.cuda_include() is None, reason="no CUDA headers here")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DRAWS = 4  # of ours: the host build is slow
DRAWS_OF_EAGER = 64  # a sign or none differs in most of them


def bottlenecks():
    """Two stages: projections with strides, identities; products of several tiles, and channels beside packets'."""
    return nn.Sequential(
        randomize(Bottleneck(16, 8, 2, randomize(projection(16, 32, 2)))),
        randomize(Bottleneck(32, 8), seed=1),
        randomize(Bottleneck(32, 20, 2, randomize(projection(32, 80, 2))), seed=2),
        randomize(Bottleneck(80, 20), seed=3),
    )


def basic_blocks():
    """The same of basic blocks: a stride in a 3x3 convolution, whose input gradient is the library's."""
    return nn.Sequential(
        randomize(BasicBlock(16, 16)),
        randomize(BasicBlock(16, 40, 2, randomize(projection(16, 40, 2))), seed=1),
        randomize(BasicBlock(40, 40), seed=2),
        randomize(BasicBlock(40, 80, 2, randomize(projection(40, 80, 2))), seed=3),
    )


NETWORKS = {"gram": bottlenecks, "separate": bottlenecks, "prologue": basic_blocks}  # by recipe
PRODUCTS_OF = {**SERVED, "prologue": BN | {"conv3x3_forward", "conv3x3_backward_input"}}


def inputs(recipe, dtype):
    """The network with convolutions in `dtype` and BN in float32, x and dy."""
    model, generator = NETWORKS[recipe](), torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
    x = torch.randn(4, 16, 16, 16, generator=generator)
    dy = torch.randn(4, 80, 4, 4, generator=generator) + 0.5
    return model, *(t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, dy))


def read_network(model, x):
    blocks, units = [], ()
    with torch.no_grad():
        for block in model:
            config, of_block = read(block, x)
            blocks.append(config)
            units += of_block
            x = copy.deepcopy(block)(x)
    return Network(tuple(blocks)), units


@pytest.fixture(scope="module")
def native():
    ops = HostCudaOps(cuda_host_build.load(cuda_host_build.build("plain")))
    ops.module.set_device(4, 1 << 16)
    ops.module.seed(1)
    return cuda_host_backend.backend(ops)


def test_every_native_op_is_in_the_host_build(native):
    missing = [
        name for name, kind in RAW_OPS.items() if kind in native.functions and not hasattr(HostCudaOps, name)
    ]
    assert not missing
    assert {name for name, kind in RAW_OPS.items() if kind not in native.functions} <= LIBRARY


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", NETWORKS)
def test_a_network_is_as_accurate_as_eager(native, recipe, dtype):
    model, x, dy = inputs(recipe, DTYPES[dtype])
    config, units = read_network(model, x)
    trace = []
    ops = Dispatcher((traced(native, trace), traced(REFERENCE, trace)))
    assert_block_as_accurate_as_eager(
        partial(network_by_recipe, ops, recipe), config, x, units, dy, DRAWS, DRAWS_OF_EAGER
    )
    assert {op for op, backend in trace if backend == native.name} >= PRODUCTS_OF[recipe]
    assert {op for op, backend in trace if backend != native.name} <= LIBRARY


@pytest.fixture
def installed(native, monkeypatch):
    """`backend="native"` is the host build; the trace of what is served from now on."""
    trace = []
    loaders = {b.name: partial(traced, b, trace) for b in (native, REFERENCE)}  # in order, and without Triton
    monkeypatch.setattr(dispatch, "LOADERS", loaders)
    dispatch._dispatcher.cache_clear()
    yield trace
    dispatch._dispatcher.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", NETWORKS)
def test_a_patched_network_runs_the_same_kernels(native, installed, recipe, dtype):
    """Through patch and autograd: bitwise what the recipe gives by itself, and nothing but it."""
    model, x, dy = inputs(recipe, DTYPES[dtype])
    config, units = read_network(model, x)
    expected = network_by_recipe(Dispatcher((native, REFERENCE)), recipe, config, x, units, dy)
    fused = patched(model, recipe, backend=native.name)
    step = one_step(fused, x, dy)
    assert ran_as(fused, recipe) and len(installed) > 30
    assert {op for op, backend in installed if backend != native.name} <= LIBRARY
    assert torch.equal(step.y, expected.y) and torch.equal(step.dx, expected.gradients[0])
    names = {id(p): name for name, p in model.named_parameters()}
    flat = [t for unit in units for t in unit[:PARAMETERS]]
    for t, gradient in zip(flat, expected.gradients[1:], strict=True):
        assert t is None or torch.equal(step.gradients[names[id(t)]], gradient), names[id(t)]
