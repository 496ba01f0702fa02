"""Bytes of each recipe, counted from its launches, against the byte model: ResNet-50, batch 256, bfloat16."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from counted_bytes import META_TRITON, count, counting
from layers import read_network
from roofline import Machine, launches
from torch import nn
from triton_entries import entries

from fusedres import models
from fusedres.ops.contract import BatchNormVectors, GramBackwardCoefficients, GramOutputStats

BATCH = 256
# a kernel of the model: what is launched for it
SAME = {
    "bn_add_relu_forward, again": "bn_add_relu_forward",
    "bn_relu_maxpool_backward_input": "bn_relu_maxpool_backward",
    "bn_relu_maxpool_backward_reduce": "bn_relu_maxpool_backward",
    "add_gradients": "add_",
}

NATIVE = {"add_gradients": "add_", "copy of a sum that two BNs share": "clone"}
NOT_IN_A_RECIPE = {"bn_running_stats", "cast"}  # the autograd Function and `Recipe` call for them


@pytest.fixture(scope="module", params=["separate", "gram"])
def recipe(request):
    return request.param


@pytest.fixture(scope="module")
def counted(recipe):
    return count(models.create("resnet50"), recipe, BATCH)


@pytest.fixture(scope="module")
def predicted(recipe):
    """Without a cache: a launch is counted with what it is given, wherever that lies."""
    network = read_network("resnet50", models.create("resnet50"), (3, 224, 224))
    schedule = {"separate": "separate_product_stats", "gram": "gram_own_1x1"}[recipe]
    found = launches(network, schedule, BATCH, machine=Machine(cache=0))
    return [launch for launch in found if launch.layer not in ("head", "optimizer")]


def test_bytes_are_those_of_the_model(counted, predicted):
    assert sum(x.bytes for x in counted) == pytest.approx(sum(x.bytes for x in predicted), rel=0.1)


def test_bytes_of_every_block_are_those_of_the_model(counted, predicted):
    """Of the kernels that the model has: products of Cin x Cin weigh more where maps are small."""
    blocks, expected = Counter(), Counter()
    known = {SAME.get(launch.kernel, launch.kernel) for launch in predicted}
    for launch in counted:
        blocks[launch.layer] += launch.bytes if launch.kernel in known else 0
    for launch in predicted:
        name = ".".join(launch.layer.split(".")[:2])
        expected["stem" if name == "conv1" else name] += launch.bytes
    assert set(blocks) == set(expected) and len(blocks) == 17
    for name, moved in expected.items():
        assert blocks[name] == pytest.approx(moved, rel=0.1), name


def test_bytes_of_every_kernel_are_those_of_the_model(counted, predicted):
    kernels, expected = Counter(), Counter()
    for launch in counted:
        kernels[launch.kernel] += launch.bytes
    for launch in predicted:
        expected[SAME.get(launch.kernel, launch.kernel)] += launch.bytes
    for name, moved in expected.items():
        assert kernels[name] == pytest.approx(moved, rel=0.1) or not moved, name
    # what the model leaves out: merges of partials, channel vectors, products of Cin x Cin
    rest = sum(moved for name, moved in kernels.items() if not expected.get(name))
    assert rest <= 0.05 * sum(kernels.values())


def test_gram_makes_no_raw_output_of_the_last_convolution(recipe, counted):
    """By the launches of layer1.1: with n one narrow tensor, the raw output would be 4n more, twice over."""
    narrow = BATCH * 64 * 56 * 56 * 2
    wide = [x for x in counted if x.layer == "layer1.1" and x.phase == "forward" and x.bytes >= 5 * narrow]
    moved = sorted(round(x.bytes / narrow) for x in wide)
    assert moved == ([5, 9] if recipe == "gram" else [5, 5, 12])


def test_no_launch_copies_a_layout(counted):
    smallest = BATCH * 512 * 7 * 7 * 2
    assert not [x for x in counted if x.kernel in ("clone", "_to_copy", "copy_") and x.bytes >= smallest]


def test_every_launched_variant_is_compiled_ahead_of_time(counted):
    """Which arguments are None decides what Triton compiles: the resource table must hold each such program."""
    every = entries()
    kernels = {entry.kernel.__name__.removesuffix("_kernel"): entry.kernel for entry in every}
    compiled = {(entry.kernel, frozenset(entry.signature)) for entry in every}
    launched = {(kernels[x.kernel], x.arguments) for x in counted if x.kernel in kernels}
    assert len(launched) > 10
    for kernel, given in launched:
        runtime = given - {p.name for p in kernel.params if p.is_constexpr}
        assert (kernel, runtime) in compiled, (kernel.__name__, sorted(runtime))


def test_launches_of_the_algebra_on_weights():
    """Each one: a step has as many of them as it has blocks, and all they cost is to be launched."""

    def vector(*shape):
        return torch.empty(shape, device="meta")

    weight = torch.empty(256, 64, 1, 1, device="meta", dtype=torch.bfloat16)
    m, S, center = vector(64), vector(64, 64), vector(64)
    above = vector(256, 64), vector(256), weight, None, BatchNormVectors(*(vector(256) for _ in range(5))), 9
    frozen = GramBackwardCoefficients(*above)
    training = frozen._replace(m=m, S=S, center=center)
    found = []
    for op in (GramOutputStats(weight, None, m, S), training, frozen):
        with counting() as counter:
            META_TRITON(op)
        found.append([launch.kernel for launch in counter.found])
    assert found == [
        ["_to_copy", "_to_copy", "mm", "gram_output_stats"],
        ["gram_bn_backward", "_to_copy", "mm", "gram_weight_gradient", "mm", "gram_offset"],
        ["gram_bn_backward"],  # frozen statistics
    ]


def test_rules_by_hand():
    x = torch.empty(2, 8, 6, 6, device="meta", dtype=torch.bfloat16, memory_format=torch.channels_last)
    convs = [nn.Conv2d(8, 16, k, 2, k // 2, bias=False).to("meta", torch.bfloat16) for k in (1, 3)]
    with torch.no_grad(), counting() as counter:
        for conv in convs:
            conv(x)
        x.contiguous() + 1
    y = 2 * 16 * 9 * 2
    assert [(c.kernel, c.bytes) for c in counter.found] == [
        ("convolution", 2 * 8 * 9 * 2 + 8 * 16 * 2 + y),
        ("convolution", 2 * 8 * 36 * 2 + 8 * 16 * 9 * 2 + y),
        ("clone", 2 * 2 * 8 * 36 * 2),
        ("add", 2 * 2 * 8 * 36 * 2),
    ]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_native_kernels_of_prologue_are_those_of_the_model(name):
    """Each kernel as often as the model has it, and its bytes, but for the library's gradients of weights, which the
    model has in float32."""
    network = read_network(name, models.create(name), (3, 224, 224))
    kernels, expected = Counter(), Counter()
    bytes_of, modelled = Counter(), Counter()
    for launch in count(models.create(name), "prologue", BATCH, native=True):
        kernels[launch.kernel] += 1
        bytes_of[launch.kernel] += launch.bytes
    for launch in launches(network, "prologue", BATCH, machine=Machine(cache=0)):
        if launch.layer not in ("head", "optimizer"):
            kernel = launch.kernel.partition(",")[0]
            expected[NATIVE.get(kernel, kernel)] += 1
            modelled[NATIVE.get(kernel, kernel)] += launch.bytes
    for kernel, times in expected.items():
        if kernel in NOT_IN_A_RECIPE:
            continue
        assert kernels[kernel] == times, kernel
        assert bytes_of[kernel] == pytest.approx(modelled[kernel], rel=0.02) or not modelled[kernel], kernel
    assert set(kernels) - set(expected) <= {"copy_"}  # of BN's parameters, which are float32 in a network
