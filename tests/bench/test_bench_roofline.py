"""The byte model for ResNet-50, batch 256, bfloat16, against an independent count and counts by hand."""

import pytest
from layers import read_network
from roofline import Machine, launches, main, totals
from schedules import SCHEDULES

from fusedres import models

BATCH = 256
# schedule: GB, ms of an independent count, kernel by kernel instead of tensor by tensor
INDEPENDENT = {
    "unfused": (123.45, 31.81),
    "inductor": (89.94, 24.02),
    "separate": (81.37, 22.02),
    "separate_product_stats": (77.16, 21.04),  # of those, 4.21 GB less: raw outputs of plain 1x1 convolutions
    "separate_epilogue_stats": (76.03, 20.78),
    # of separate_product_stats: 0.71 GB of statistics of 3x3 convolutions less, 0.62 GB of dc not read back, and
    # 0.19 GB of raw outputs more that are no longer in the cache when activations are made again
    "prologue": (76.04, 20.78),
    "fused_1x1": (71.11, 19.40),
    "across_blocks": (57.73, 15.69),
    "gram": (57.88, 16.37),  # 1.39 GB more: raw outputs of first convolutions, for their statistics
    "gram_own_1x1": (56.49, 16.05),
    "gram_own_3x3": (52.15, 14.67),
}


@pytest.fixture(scope="module")
def resnet50():
    return read_network("resnet50", models.create("resnet50"), (3, 224, 224))


def correction(network, schedule: str) -> float:
    """GB that the launches move and the independent count leaves out."""
    found = launches(network, schedule, BATCH)
    if schedule.startswith(("separate", "prologue")):
        # one autograd Function a block must return one dx: the count lets the block below read both summands
        return sum(x.bytes for x in found if x.kernel == "add_gradients") * 2 / 3 / 1e9
    if schedule.startswith("gram"):
        # strided projections stay with the library: statistics in a pass of their own, dc read back, and an
        # input gradient stored and read with its zeros
        projections = [b.projection for b in network.blocks if b.projection is not None]
        read_back = sum(p.cout * p.h * p.w for p in projections)
        statistics = sum(p.cout * p.h * p.w for p in projections if p.strided)
        zeros = sum(p.cin * (p.h_in * p.w_in - p.h * p.w) for p in projections)
        return (read_back + statistics + 2 * zeros) * 2 * BATCH / 1e9
    return 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_totals(resnet50, schedule):
    gigabytes, milliseconds = INDEPENDENT[schedule]
    found = totals(launches(resnet50, schedule, BATCH), Machine())
    missing = correction(resnet50, schedule)
    assert found.bytes / 1e9 - missing == pytest.approx(gigabytes, rel=0.02)
    missing_ms = missing * 1e9 / Machine().bandwidth * 1e3
    assert found.seconds * 1e3 - missing_ms == pytest.approx(milliseconds, rel=0.02)


def test_layer_table(resnet50):
    assert len(resnet50.convs) == 53
    assert resnet50.parameters == 25_557_032
    forward = sum(2 * c.h * c.w * c.weights for c in resnet50.convs) + 2 * 2048 * 1000
    assert forward == pytest.approx(8.178e9, rel=1e-3)
    assert [b.name for b in resnet50.blocks if b.projection] == [f"layer{i}.0" for i in (1, 2, 3, 4)]


def test_identity_block_by_hand(resnet50):
    """layer3.1 at batch 1: a narrow tensor is n, a wide one 4n; tensors moved, counted on paper."""
    n, mask = 256 * 14 * 14 * 2, 4 * 256 * 14 * 14 / 8
    weights = 256 * 1024 * 2 + 256 * 256 * 9
    moved = {
        s: sum(x.bytes for x in launches(resnet50, s, 1, machine=Machine(cache=0)) if "layer3.1." in x.layer)
        for s in SCHEDULES
    }
    # forward: convs 4+1 1+1 1+4, statistics 1+1+4, apply 2+2+8, relu 2+2, add 12, relu 8
    # backward: relu 12+3+3, reduce and input 5*(4+1+1), convs 2*(5+2+5), add 12
    eager = 12 + 6 + 12 + 4 + 12 + 8 + 18 + 30 + 24 + 12
    assert moved["unfused"] == eager * n + weights * (2 + 2 + 4)
    # forward: c1 5, a1 2, c2 2, stats 1, gram 1, c3 1+4+4
    # backward: R 1+4, da 1+4+1, a1 2, c2: dc 3, da 2, dw 2, reduce 2, c1: 1+1+4 in, 4+1 out, dw 5
    # the mask is written once and read by R, da and the shortcut
    # dc of c1 is made by a pass of its own and read back
    gram = 5 + 2 + 2 + 1 + 1 + 9 + 5 + 6 + 2 + 3 + 2 + 2 + 2 + 11 + 1 + 5
    assert moved["gram_own_1x1"] == moved["gram"] - n == gram * n + 4 * mask + weights * (2 + 2 + 4)


def test_basic_blocks_have_no_gram_form():
    network = read_network("resnet18", models.create("resnet18"), (3, 224, 224))
    assert launches(network, "gram", 8) == launches(network, "separate", 8)


def test_ridge_divides_what_binds(resnet50):
    machine = Machine(bandwidth=1e12, peak=100e12)
    found = launches(resnet50, "unfused", 8)
    bound = [x for x in found if 0 < x.flops / x.bytes < machine.ridge]
    assert totals(found, machine).bandwidth_bound == len(bound) > 0


def test_command_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["roofline.py", "cifar_resnet20", "--batch", "8"])
    main()
    printed = capsys.readouterr().out
    assert "ridge 184" in printed
    assert all(name in printed for name in SCHEDULES)
