"""Tools that count products by torch's registry see ours: as many as unpatched, and those that `gram` adds."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from asked_gradients import net, picture
from block_forms import FORMS, RECIPE_FORM_IDS, RECIPE_FORMS, one_step, patched, tensors_for
from flops import Flops, flops_of
from same_model import images, pair
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fusedres.models import Bottleneck
from fusedres.ops.dispatch import opaque_backend
from fusedres.ops.flops import NATIVE
from fusedres.ops.native import library
from fusedres.patching import call


def steps(block, x, dy):
    """Products of inference and of a training step."""
    with torch.no_grad():
        inference = flops_of(copy.deepcopy(block).eval(), x)
    return inference, flops_of(one_step, block, x, dy)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_separate_counts_what_eager_counts(form, backend):
    plain = form.build()
    x, dy = tensors_for(form, plain, torch.float32)
    fused = patched(copy.deepcopy(plain), "separate", backend)
    assert steps(fused, x, dy) == steps(plain, x, dy)


def test_gram_adds_the_products_of_its_moments():
    plain, fused = pair(lambda: Bottleneck(32, 8), "gram")
    x, dy = images(3, 32, 6, 6), images(3, 32, 6, 6, seed=1)
    rows, cin, cout = 3 * 6 * 6, 8, 32
    forward = rows * cin * cin + cout * cin * cin
    backward = rows * cin * cin + 2 * cout * cin * cin + cout * cin + cin * cin
    expected, found = steps(plain, x, dy), steps(fused, x, dy)
    assert found[0] == expected[0]
    assert found[1] == expected[1] + 2 * (forward + backward)


@pytest.mark.parametrize(("recipe", "form"), RECIPE_FORMS, ids=RECIPE_FORM_IDS)
def test_a_blocks_operators_count_what_runs_inside(recipe, form, monkeypatch):
    block = form.build()
    x, dy = tensors_for(form, block, torch.float32)
    expected = steps(patched(copy.deepcopy(block), recipe, "reference"), x, dy)
    monkeypatch.setattr(call, "dispatcher", opaque_backend)
    assert steps(patched(block, recipe), x, dy) == expected


def test_the_operators_of_a_net_with_a_stem(monkeypatch):
    plain, fused = pair(net)
    monkeypatch.setattr(call, "dispatcher", opaque_backend)
    for model in (plain, fused):
        with Flops() as counted:
            model(picture()).sum().backward()
        model.total = counted.total
    assert fused.total == plain.total
    assert {"fusedres.residual_block_forward", "fusedres.residual_block_backward"} <= counted.operators


@pytest.mark.skipif(not library.is_built(), reason="the native library is not built")
def test_every_native_operator_that_multiplies_has_a_formula():
    names = [op for op in library.LIBRARY_OPS if "conv" in op or "gram" in op]
    assert set(names) == set(NATIVE)
    assert all(getattr(torch.ops.fusedres_native, name) in flop_registry for name in names)


@pytest.mark.parametrize("recipe", ["separate", "auto"])
def test_torchs_own_counter_around_a_backward(recipe):
    totals = []
    for model in pair(net, recipe):
        loss = model(picture()).sum()
        with FlopCounterMode(display=False) as counted:
            loss.backward()
        totals.append(counted.get_total_flops())
    assert totals[1] == totals[0] > 0


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_graph(training):
    totals = []

    def compiler(graph, inputs):
        def run(*args):
            with Flops() as counted:
                out = graph(*args)
            totals[-1] += counted.total
            return out

        return run

    for model in pair(lambda: net()[1]):
        torch._dynamo.reset()
        totals.append(0)
        x = images(2, 64, 6, 6).requires_grad_(training)
        y = torch.compile(model.train(training), backend=aot_autograd(fw_compiler=compiler), fullgraph=True)(
            x
        )
        if training:
            y.sum().backward()
    torch._dynamo.reset()
    assert totals[1] == totals[0] > 0


HIDDEN = """
import pathlib
is_file = pathlib.Path.is_file
pathlib.Path.is_file = lambda path: path.name != "libfusedres_native.so" and is_file(path)
"""
REGISTERED = """
from torch.utils.flop_counter import flop_registry
import torch, fusedres
names = {str(op) for op in flop_registry if str(op).startswith("fusedres")}
assert {"fusedres.residual_block_backward", "fusedres.residual_block_forward"} <= names, names
"""


@pytest.mark.parametrize(
    "code",
    [
        "import sys, fusedres\nassert 'torch.utils.flop_counter' not in sys.modules" + REGISTERED,
        REGISTERED,
        HIDDEN + REGISTERED + "assert not any(name.startswith('fusedres_native') for name in names)",
    ],
    ids=["after", "before", "without-native"],
)
def test_registered_in_whatever_order_one_imports(code):
    subprocess.run([sys.executable, "-c", code], check=True)


def test_operators_that_few_calls_reach_count_as_the_convolution_does():
    image, wide, weight, vector = (2, 16, 3, 5), (2, 24, 3, 5), (24, 16, 1, 1), (24,)
    one = NATIVE["conv1x1_forward"](image, weight, out_shape=[wide, None, None, None])
    into = vector, vector, None, None, None, True, wide
    assert NATIVE["conv1x1_forward_out"](image, weight, 1, *into, out_shape=None) == one
    for name in ("conv_backward_input_out", "conv3x3_backward_input_out"):
        assert NATIVE[name](wide, weight, None, None, image, out_shape=None) == one
    bn = vector, vector, vector, None, None
    assert NATIVE["conv1x1_backward_input"](wide, wide, *bn, weight, True, out_shape=[image, wide]) == one
    r = (24, 16), (24,)
    assert NATIVE["conv1x1_backward_weight"](wide, None, image, (16,), (16,), None, out_shape=r) == one
    assert NATIVE["gram"](image, (16,), (16,), out_shape=[(16,), (16, 16)]) * 24 == one * 16


@pytest.mark.parametrize("training", [True, False])
def test_operators_of_a_gram_form_count_its_products(training):
    rows, cin, cout = 30, 16, 24
    image, wide, weight = (2, cin, 3, 5), (2, cout, 3, 5), (cout, cin, 1, 1)
    moments = ((cin,), (cin, cin), (cin,)) if training else (None,) * 3
    stats = NATIVE["gram_output_stats"](weight, None, *moments[:2], out_shape=[(cout,), (cout,), (cin,)])
    assert stats == 2 * cout * cin * cin
    vectors = (cout,), (cout,), (cout,)
    made = [(cout,), (cout, cin), (cout, cin), *moments[1::-1]]
    args = (cout, cin), (cout,), weight, None, *vectors, rows, *moments
    of_weights = 2 * cin * (2 * cout * cin + cout + cin) if training else 0
    assert NATIVE["gram_backward_coefficients"](*args, out_shape=made) == of_weights
    coefficients = (cout, cin), *moments[1::-1], moments[0]
    args = wide, None, image, (cin,), (cin,), (cin,), *coefficients
    of_rows = 2 * rows * cin * (cout + cin * training)
    found = NATIVE["conv1x1_gram_backward_input"](*args, out_shape=[image, (cin,), (cin,)])
    assert found == of_rows
