"""What a training step asks of the host on a GPU's path: raw ops, launches and operators are those of the table."""

import json
import subprocess
import sys

import host_counts
import pytest
import torch

pytest.importorskip("triton")

from gpu_stand_in import steps
from layers import read_network
from native_on_meta import REDUCING
from roofline import launches
from torch import nn

from fusedres.ops.contract import op_name

MODELLED = {
    "separate": "separate",
    "prologue, native": "prologue",
    "gram": "gram",
}  # a way to run: its schedule
# of a step's operators those that are no block's: the classifier, the loss, and what casts and copies for them
HEAD = {"mean", "addmm", "mm", "sum", "div", "ones_like", "new_zeros", "as_strided_", "copy_", "_log_softmax"}
HEAD |= {"_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward"}
CASTS_OF_HEAD, PRODUCTS_OF_HEAD = 7, 2
BY_TRITON = (
    "conv1x1",
    "gram",
)  # raw ops whose launches are counted as Triton's, where the native backend has none
INPUT_GRADIENTS = (
    "conv1x1_backward_input",
    "conv3x3_backward_input",
)  # of which the library has the weight's alone


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, "-W", "ignore", host_counts.__file__, "--print"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


def test_counts_are_those_of_the_table(found):
    table = json.loads(host_counts.TABLE.read_text())
    assert found == table, "run `python tests/support/host_counts.py` and look at what changed"


def test_a_patched_step_has_fewer_operators_than_eager(found):
    for by_case in found.values():
        eager = sum(by_case["eager"]["operators"].values())
        for case, counts in by_case.items():
            if case == "eager":
                assert not counts["raw_ops"] and not counts["triton_launches"]
            else:
                assert sum(counts["operators"].values()) < eager


def test_each_convolution_has_its_statistics_once(found):
    """53 in ResNet-50: gram's 16 last of a block come from moments of their inputs, native ones from the product."""
    for case, counts in found["resnet50"].items():
        raw_ops = counts["raw_ops"]
        if case == "gram, native":
            by_library = counts["operators"]["convolution"]
            assert raw_ops["bn_stats"] == by_library
            assert by_library + raw_ops["conv1x1_forward"] + raw_ops["conv3x3_forward"] == 53
        else:
            assert case == "eager" or raw_ops["bn_stats"] + raw_ops.get("gram_output_stats", 0) == 53, case


def launched(counts, native):
    """Launches of a step's stem and blocks: each operator and raw op one, but for gradients and counters.

    native: whether the native backend, and not Triton, has products.
    """
    operators, total = dict(counts["operators"]), sum(counts["triton_launches"].values())
    products = operators.pop("mm") - PRODUCTS_OF_HEAD + operators.pop("_to_copy") - CASTS_OF_HEAD
    total += products + sum(times for name, times in operators.items() if name not in HEAD)
    raw_ops = counts["raw_ops"]
    # a launch for each gradient: of the images none is wanted
    total += operators["convolution_backward"] - 1 - sum(raw_ops.get(name, 0) for name in INPUT_GRADIENTS)
    total += sum(raw_ops.get(op_name(kind), 0) for kind in REDUCING)  # a memset of the counters
    if native:  # of the statistics of epilogues too
        return total + sum(raw_ops.values()) + raw_ops["conv1x1_forward"] + raw_ops["conv3x3_forward"]
    return total + sum(times for name, times in raw_ops.items() if not name.startswith(BY_TRITON))


@pytest.mark.parametrize(
    ("network", "case"),
    [
        ("resnet18", "separate"),
        ("resnet18", "prologue, native"),
        ("resnet50", "separate"),
        ("resnet50", "gram"),
    ],
)
def test_launches_are_those_of_the_byte_model(found, network, case):
    narrow = read_network(network, steps.network(network).eval(), steps.SHAPE[1:])
    expected = launches(narrow, MODELLED[case], steps.SHAPE[0])
    blocks = [x for x in expected if x.layer not in ("head", "optimizer")]
    assert launched(found[network][case], native=case.endswith("native")) == len(blocks)


def test_products_without_values_have_the_sizes_and_do_no_arithmetic():
    x = torch.randn(2, 6, 7, 9, requires_grad=True)
    convolution = nn.Conv2d(6, 4, 3, 2, padding=1, dilation=2, groups=2)
    exact = convolution(x)
    layer = nn.Linear(4, 5)
    torch.use_deterministic_algorithms(True)  # memory that nobody has written is NaN
    try:
        with steps.products_without_values():
            y = convolution(x)
            y.sum().backward()
            z = layer(y.detach().mean((2, 3)))
            z.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert y.shape == exact.shape and y.dtype == exact.dtype and y.isnan().all()
    assert z.shape == (2, 5) and z.isnan().all() and layer.weight.grad.isnan().all()
    for t in (x, *convolution.parameters()):
        assert t.grad.shape == t.shape and t.grad.isnan().all()
    assert torch.equal(convolution(x), exact), "they do not compute again afterwards"
