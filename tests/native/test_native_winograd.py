"""3x3 convolutions by Winograd's algorithm: of any size, of inputs that hurt it, of NaN, by any number of threads."""

import copy
import multiprocessing
import threading
from dataclasses import replace

import conv3x3_checks
import pytest
import torch
from conv1x1_cases import ConvCase
from raw_op_cases import bits, cases_of
from raw_op_checks import CHECKS
from torch import Tensor, nn
from winograd_backends import with_tiles

import fusedres
from fusedres.models import BasicBlock, cifar_resnet
from fusedres.ops import accuracy
from fusedres.ops.contract import Conv3x3Forward, ConvBackwardInput, ConvBackwardWeight
from fusedres.ops.dispatch import dispatcher
from fusedres.ops.native import functions, library, winograd
from fusedres.ops.reference import REFERENCE

pytestmark = pytest.mark.skipif(not library.is_built(), reason="no compiled library in this installation")

WINDOW = (1, 1), (1, 1), (1, 1), 1
tiles = pytest.mark.parametrize("tile", [winograd.LARGE, winograd.SMALL], ids=["F4", "F2"])


FEWEST_VALUES = winograd.FEWEST_VALUES


@pytest.fixture(autouse=True)
def of_few_values_too(monkeypatch):
    """The larger tile, for small and quick cases."""
    monkeypatch.setattr(winograd, "FEWEST_VALUES", 0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def images(*shape: int, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.contiguous(memory_format=torch.channels_last)


def three(batch: int, cin: int, cout: int, height: int, width: int, seed: int = 0):
    """A forward, an input gradient and a weight gradient of one convolution."""
    x, dy = images(batch, cin, height, width, seed=seed), images(batch, cout, height, width, seed=seed + 1)
    weight = images(cout, cin, 3, 3, seed=seed + 2) / (9 * cin) ** 0.5
    return (
        Conv3x3Forward(x, weight, save_stats=True),
        ConvBackwardInput(dy, x, weight, *WINDOW),
        ConvBackwardWeight(dy, x, (3, 3), *WINDOW),
    )


def result(backend, op) -> Tensor:
    assert backend.reason(op) is None
    found = backend(op)
    return found.y if isinstance(op, Conv3x3Forward) else found


FUSED = ("prologue_stats", "prologue_projection", "identity_no_relu", "affine", "raw")
# not P1: BN of a single position divides by the root of eps alone, and eager's error is that of one sum
DENSE = [c for c in conv3x3_checks.cases_of("conv3x3_forward") if c.layout in ("channels_last", "offset")]


@tiles
@pytest.mark.parametrize("case", [c for c in DENSE if c.form in FUSED and c.id not in ("N0", "P1")], ids=str)
def test_forward_of_any_size(case, tile):
    conv3x3_checks.CHECKS["conv3x3_forward"](with_tiles(tile), case)


GRADIENTS = [
    (op, case)
    for op, forms in (("conv_backward_weight", ("3x3",)), ("conv_backward_input", ("3x3_mask",)))
    for case in cases_of(op)
    if case.form in forms
    and case.layout in ("channels_last", "offset")
    and ("mask" not in case.form or case.shape[1] % 8 == 0)
]


@tiles
@pytest.mark.parametrize(("op", "case"), GRADIENTS, ids=lambda part: str(part))
def test_gradient_of_any_size(op, case, tile):
    CHECKS[op](with_tiles(tile), replace(case, dtype=torch.float32))


# more tiles than a chunk holds; more channels than are summed at once, or than a panel; weights that no thread shares
LARGE = [(5, 40, 72, 30, 27), (1, 300, 50, 9, 13), (2, 600, 520, 6, 5), (40, 130, 136, 16, 13)]


def limits(op, shortcut: Tensor | None = None) -> tuple[float, float]:
    """The error of Winograd's algorithm, and the largest that passes."""
    exact = result(
        REFERENCE, op._replace(**{n: t.double() for n, t in op._asdict().items() if isinstance(t, Tensor)})
    )
    eager = accuracy.relative_error(result(REFERENCE, op), exact)
    return accuracy.relative_error(result(functions.backend(), op), exact), accuracy.error_limit(
        eager, torch.float32
    )


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_every_way_to_share_the_work(sizes, count, threads):
    """By tiles, by results and by both; each number of threads gives one result."""
    threads(count)
    for op in three(*sizes):
        error, limit = limits(op)
        assert error <= limit, type(op).__name__
        one, again = (result(functions.backend(), op) for _ in range(2))
        assert torch.equal(bits(one), bits(again))


def low_pass(op):
    """Weights that sum what their neighbours cancel least."""
    weight = op.weight.abs() if hasattr(op, "weight") else None
    return op if weight is None else op._replace(weight=weight)


def scaled(factor: float):
    def change(op):
        return op._replace(**{n: t * factor for n, t in op._asdict().items() if n in ("x", "dy")})

    return change


def shifted(op):
    return op._replace(x=op.x + 30)


def outliers(op):
    return op._replace(**{n: t**5 for n, t in op._asdict().items() if n in ("x", "dy")})


def sparse(op):
    """One value of a thousand."""
    changes = {}
    for name in ("x", "dy"):
        if hasattr(op, name):
            t = getattr(op, name)
            changes[name] = t * (images(*t.shape, seed=9) > 3.1)
    return op._replace(**changes)


HURTING = {
    "low_pass": low_pass,
    "tiny": scaled(1e-15),
    "huge": scaled(1e15),
    "mean30": shifted,
    "outliers": outliers,
    "sparse": sparse,
}


@pytest.mark.parametrize("change", HURTING)
def test_inputs_that_hurt_have_room_left_within_the_limit(change):
    for sizes in ((2, 64, 64, 28, 28), (2, 256, 256, 14, 14), (4, 512, 512, 7, 7)):
        for op in three(*sizes):
            error, limit = limits(HURTING[change](op))
            assert error <= 0.7 * limit, (type(op).__name__, sizes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("place", [(0, 0), (4, 5), (8, 8)])
def test_a_value_that_is_not_finite_stands_where_it_does_in_torch(value, place):
    """The library computes such a call, bit by bit; 3e38 is finite, and its sums are not."""
    for op in three(2, 64, 64, 9, 9):
        for name in ("x", "dy", "weight"):
            if not hasattr(op, name) or (name == "x" and isinstance(op, ConvBackwardInput)):
                continue
            t = getattr(op, name).clone(memory_format=torch.channels_last)
            t[1, 3, place[0] % t.shape[2], place[1] % t.shape[3]] = value
            changed = op._replace(**{name: t})
            expected = result(REFERENCE, changed)
            if not expected.isfinite().all():
                assert torch.equal(bits(result(functions.backend(), changed)), bits(expected)), (
                    type(op),
                    name,
                )


def test_what_cannot_be_told_from_the_results_is_not_kept_of_a_call_that_was_not_finite():
    """The shortcut's gradient is added once, and given away it is not written before the result is known."""
    _, op, _ = three(2, 64, 64, 9, 9)
    dy = op.dy.clone()
    dy[0, 0, 0, 0] = float("nan")
    shortcut = images(2, 64, 9, 9, seed=5)
    op = op._replace(dy=dy, shortcut_dy=shortcut, reuse_shortcut=True)
    expected = REFERENCE(op._replace(shortcut_dy=shortcut.clone()))
    assert torch.equal(bits(functions.backend()(op)), bits(expected))


def test_two_threads_and_more_at_once(threads):
    """Each has memory of its own."""
    threads(3)
    sizes = [(2, 32 + 16 * i, 48, 9 + i, 14) for i in range(4)]
    work = [three(*s, seed=i) for i, s in enumerate(sizes)]
    expected = [[result(functions.backend(), op) for op in ops] for ops in work]
    wrong = []

    def run(place: int) -> None:
        torch.set_num_threads(3)
        for _ in range(10):
            for op, known in zip(work[place], expected[place], strict=True):
                if not torch.equal(result(functions.backend(), op), known):
                    wrong.append(op)

    started = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert not wrong


def forked(queue) -> None:
    torch.set_num_threads(1)
    queue.put([result(functions.backend(), op).double().sum().item() for op in three(2, 64, 64, 20, 20)])


def test_a_process_forked_after_use(threads):
    threads(1)
    expected = [result(functions.backend(), op).double().sum().item() for op in three(2, 64, 64, 20, 20)]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=forked, args=(queue,))
    child.start()
    found = queue.get(timeout=60)
    child.join()
    assert found == expected and child.exitcode == 0


def test_the_variable_leaves_them_to_torch(monkeypatch):
    monkeypatch.setenv(winograd.ENVIRONMENT_VARIABLE, "0")
    forward, gradient, weight = three(2, 64, 64, 8, 8)
    assert functions.backend().reason(forward) == "winograd_off"
    assert functions.backend().reason(gradient) == "not_pointwise"
    monkeypatch.delenv(winograd.ENVIRONMENT_VARIABLE)
    by_tiles = result(functions.backend(), weight)
    monkeypatch.setenv(winograd.ENVIRONMENT_VARIABLE, "0")
    assert not torch.equal(result(functions.backend(), weight), by_tiles)


@pytest.fixture
def tiles_used(monkeypatch):
    """The last argument of every call of the three operators."""
    used = []

    class Recorded:
        def __getattr__(self, name):
            def run(*args):
                used.append(args[-1])
                return getattr(torch.ops.fusedres_native, name)(*args)

            return run

    monkeypatch.setattr(winograd, "LIBRARY", Recorded())
    return used


@pytest.mark.parametrize(("accuracy", "tile"), [("fast", 4), ("strict", 2)])
def test_accuracy_of_a_patched_block(accuracy, tile, tiles_used):
    """Strict, weight gradients are summed directly."""
    block = BasicBlock(64, 64).to(memory_format=torch.channels_last)
    fusedres.patch(block, recipe="separate", accuracy=accuracy)
    block(images(2, 64, 8, 8).requires_grad_()).sum().backward()
    calls = 6 if accuracy == "fast" else 4
    assert tiles_used == [tile] * calls
    with torch.no_grad():
        block.eval()(images(2, 64, 8, 8))
    assert tiles_used == [tile] * (calls + 2)


def test_strict_has_no_more_error_than_a_direct_convolution():
    strict = dispatcher("auto/strict")
    for op in three(2, 128, 128, 14, 14)[:2]:
        exact = result(
            REFERENCE,
            op._replace(**{n: t.double() for n, t in op._asdict().items() if isinstance(t, Tensor)}),
        )
        errors = [accuracy.relative_error(result(b, op), exact) for b in (functions.backend(True), REFERENCE)]
        assert strict.serving(op).name == "native"
        assert errors[0] <= errors[1], type(op).__name__


def test_an_unknown_accuracy_is_named():
    with pytest.raises(ValueError, match="accuracy 'exact' is unknown, choose from fast, strict"):
        fusedres.patch(BasicBlock(16, 16), accuracy="exact")


@pytest.mark.parametrize(
    ("size", "side"), [((56, 56), 4), ((14, 14), 4), ((7, 7), 4), ((2, 2), 2), ((2, 9), 2), ((6, 6), 2)]
)
def test_the_tile_with_fewer_products(size, side):
    assert winograd.tile_of(torch.empty(1, 1, *size), 256, winograd.LARGE) == side


@pytest.mark.parametrize(
    ("batch", "summed", "side"), [(127, 16, 2), (128, 16, 4), (8, 255, 2), (1, 256, 4), (1, None, 4)]
)
def test_the_tile_of_few_values_and_channels(batch, summed, side, monkeypatch):
    """A weight gradient, which is given to no other layer, sums any number of either."""
    monkeypatch.setattr(winograd, "FEWEST_VALUES", FEWEST_VALUES)
    assert winograd.tile_of(torch.empty(batch, 1, 8, 8), summed, winograd.LARGE) == side


def trained_outputs(fused: bool, network: nn.Module, example: Tensor) -> Tensor:
    network = copy.deepcopy(network).train()
    if fused:
        fusedres.patch(network, recipe="separate")
    with torch.no_grad():
        return network(example)


@pytest.mark.parametrize(("size", "batch"), [(8, 2), (16, 4), (32, 2)])
def test_a_small_network_passes_the_rule_with_any_weights(size, batch, monkeypatch):
    """Over few values eager's batch statistics have no error that would hide one of its convolutions."""
    monkeypatch.setattr(winograd, "FEWEST_VALUES", FEWEST_VALUES)
    for seed in range(10):
        torch.manual_seed(seed)
        network = cifar_resnet(20).to(memory_format=torch.channels_last)
        example = images(batch, 3, size, size)
        found, own = (trained_outputs(fused, network, example) for fused in (True, False))
        exact = trained_outputs(False, network.double(), example.double())
        error, own_error = (accuracy.relative_error(y, exact) for y in (found, own))
        assert error <= accuracy.error_limit(own_error, torch.float32), seed


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (
            "conv3x3_forward",
            {"weight": images(8, 9, 3, 3)},
            r"weight is \[8, 9, 3, 3\], needed \[Cout, 16, 3, 3\]",
        ),
        ("conv3x3_forward", {"weight": images(8, 16, 1, 1)}, r"weight is \[8, 16, 1, 1\]"),
        ("conv3x3_forward", {"in_shift": None}, "in_scale, in_shift is given in part"),
        ("conv3x3_forward", {"shift": None}, "scale, shift is given in part"),
        ("conv3x3_forward", {"tile": 3}, "tile is 3, needed 2 or 4"),
        ("conv3x3_forward", {"save_stats": True}, "save_stats is given with an epilogue"),
        ("conv3x3_forward", {"scale": None, "shift": None}, "residual is without scale and shift"),
        ("conv3x3_forward", {"residual": images(2, 8, 5, 7)}, r"residual is \[2, 8, 5, 7\]"),
        ("conv3x3_forward", {"x": images(2, 16, 5, 6).bfloat16()}, "x is bfloat16, needed float32"),
        ("conv3x3_backward_input", {"weight": images(9, 16, 3, 3)}, r"needed \[8, Cin, 3, 3\]"),
        ("conv3x3_backward_input", {"shortcut_dy": None}, "shortcut_mask is without shortcut_dy"),
        ("conv3x3_backward_weight", {"dy": images(2, 8, 5, 7)}, r"dy is \[2, 8, 5, 7\]"),
    ],
)
def test_an_operator_says_what_is_wrong(op, change, message):
    library.load()
    vector, wide = torch.zeros(8), torch.zeros(16)
    x, dy, weight = images(2, 16, 5, 6), images(2, 8, 5, 6), images(8, 16, 3, 3)
    args = {
        "conv3x3_forward": {
            "x": x,
            "weight": weight,
            "in_scale": wide,
            "in_shift": wide,
            "scale": vector,
            "shift": vector,
            "residual": dy,
            "residual_scale": vector,
            "residual_shift": vector,
            "relu": True,
            "save_stats": False,
        },
        "conv3x3_backward_input": {
            "dy": dy,
            "weight": weight,
            "shortcut_dy": x,
            "shortcut_mask": torch.zeros(x.numel() // 8, dtype=torch.uint8),
        },
        "conv3x3_backward_weight": {"dy": dy, "x": x, "in_scale": wide, "in_shift": wide},
    }[op]
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.fusedres_native, op)(**{"tile": 4, **args, **change})


def test_images_without_elements():
    """A batch of none has a weight gradient of zeros."""
    _, gradient, weight = three(0, 24, 24, 8, 8)
    assert result(functions.backend(), weight).count_nonzero() == 0
    assert result(functions.backend(), gradient).shape == (0, 24, 8, 8)


def test_a_case_of_many_rows():
    case = ConvCase("large", (2, 70, 33, 29), cout=40, form="prologue_stats", bias_before=30.0)
    conv3x3_checks.CHECKS["conv3x3_forward"](with_tiles(winograd.LARGE), case)
