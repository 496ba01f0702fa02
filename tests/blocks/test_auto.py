"""Recipe "auto" against the measured table: what is decided before a block is read."""

from __future__ import annotations

import pytest
import torch
from block_forms import ran_as
from torch import nn

import fusedres
from fusedres.blocks import choice
from fusedres.models import BasicBlock
from fusedres.ops.native import library
from fusedres.patching import call


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("width", [8, 64])
def test_auto_reads_a_block_only_where_the_table_can_name_a_recipe(batch, grad, width, monkeypatch):
    """Small calls are told apart before anything is read, and only those: at 4 images all entries are reached."""
    entry = choice.Measured("separate", 4 * width * 36, 64, "")
    train = ("cpu", "reference", torch.float32, True)
    monkeypatch.setattr(choice, "TABLE", {train: (entry,), (*train[:3], False): (entry,)})
    reads = []
    resolve = call.resolve
    monkeypatch.setattr(call, "resolve", lambda *a: reads.append(1) or resolve(*a))
    model = fusedres.patch(nn.Sequential(BasicBlock(width, width)), recipe="auto", backend="reference")
    with torch.set_grad_enabled(grad):
        model(torch.randn(batch, width, 6, 6))
    reached = batch == 4 and width == 64
    assert bool(reads) == reached
    assert ran_as(model, "separate" if reached else "unfused")


@pytest.mark.parametrize(
    ("batch", "width", "fused"), [(4, 64, True), (2, 64, False), (2, 128, True), (4, 32, False)]
)
def test_auto_takes_any_entry_that_holds(batch, width, fused, monkeypatch):
    """Wide blocks from a smaller size on."""
    least = 4 * 64 * 36
    entries = choice.Measured("separate", least, 64, ""), choice.Measured("separate", least // 2, 128, "")
    monkeypatch.setattr(choice, "TABLE", {("cpu", "reference", torch.float32, True): entries})
    model = fusedres.patch(nn.Sequential(BasicBlock(width, width)), recipe="auto", backend="reference")
    model(torch.randn(batch, width, 6, 6))
    assert ran_as(model, "separate" if fused else "unfused")


# batch, width, side of a basic block, whether in training, and what the table for each instruction set makes of it
MEASURED = [
    ("avx2", 1, 64, 16, True, "separate"),
    ("avx2", 1, 64, 15, True, "unfused"),
    ("avx512", 2, 32, 16, True, "separate"),
    ("avx512", 1, 32, 16, True, "unfused"),
    ("avx512", 8, 16, 32, True, "separate"),
    ("avx512", 7, 16, 32, True, "unfused"),
    ("avx2", 1, 16, 32, False, "separate"),
    ("avx512", 1, 16, 31, False, "unfused"),
    ("avx512", 1, 512, 7, False, "separate"),
    ("avx2", 128, 15, 32, False, "unfused"),
    ("wider", 5, 64, 28, True, "separate"),
    ("wider", 3, 64, 28, True, "unfused"),
    ("wider", 128, 32, 32, True, "unfused"),
    ("wider", 16, 512, 7, False, "separate"),
    ("wider", 16, 256, 7, False, "unfused"),
]


@pytest.mark.skipif(not library.is_built(), reason="no compiled library in this installation")
@pytest.mark.parametrize(("instructions", "batch", "width", "side", "training", "recipe"), MEASURED)
def test_the_tables_as_they_were_measured(instructions, batch, width, side, training, recipe, monkeypatch):
    wider = instructions == "wider"
    monkeypatch.setattr(choice, "TABLE", choice.table_of("avx2" if wider else instructions, True, wider))
    model = fusedres.patch(nn.Sequential(BasicBlock(width, width)).to(memory_format=torch.channels_last))
    with torch.set_grad_enabled(training):
        model.train(training)(torch.randn(batch, width, side, side).to(memory_format=torch.channels_last))
    assert ran_as(model, recipe)


def test_the_table_is_this_machines():
    here = library.instruction_set(), library.multiplies_bfloat16(), library.onednn_is_wider()
    assert choice.table_of(*here) == choice.TABLE
    assert choice.table_of(None, True) == {}
    dtypes = [{key[2] for key in choice.table_of("avx512", half)} for half in (False, True)]
    assert dtypes == [{torch.float32}, {torch.float32, torch.bfloat16}]


class Scaled(nn.Module):
    """Has a weight, but is no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize(
    "replacement", [Scaled, lambda: nn.LazyConv2d(64, 3, padding=1)], ids=["scalar", "lazy"]
)
def test_auto_leaves_alone_what_took_the_place_of_a_convolution(replacement, monkeypatch):
    entry = choice.Measured("separate", 1, 64, "")
    monkeypatch.setattr(choice, "TABLE", {("cpu", "reference", torch.float32, True): (entry,)})
    model = fusedres.patch(nn.Sequential(BasicBlock(64, 64)), recipe="auto", backend="reference")
    model[0].conv1 = replacement()
    model(torch.randn(2, 64, 6, 6))
    (row,) = fusedres.report(model).blocks
    assert (row.runs_as, row.code) == ("unfused", "module_replaced:conv1")
