"""graphed, where no table names a recipe: each is captured and replayed, and the fastest is what the graph holds.

`cuda_graph_stand_in.py` stands for CUDA's graphs, and the test says what a replay takes.
"""

import copy

import cuda_graph_stand_in
import pytest
import torch
from accuracy import assert_same_float64
from block_forms import bottleneck
from torch import nn
from trials_on import trials_on, without_proof

import fusedres
from fusedres.blocks import user_table
from fusedres.measuring import graph_trial
from fusedres.trials import proof

WAYS = ["unfused", "gram", "separate", "unfused"]  # in the order of their captures


@pytest.fixture
def patching(tmp_path):
    with trials_on(tmp_path) as patching:
        without_proof(patching)
        cuda_graph_stand_in.install(patching)
        yield patching


def told(patching, *seconds):
    """What replays take, in that order; the graphs that were replayed."""
    left, seen = list(seconds), []

    def replayed(graphs):
        seen.append(graphs)
        return left.pop(0)

    patching.setattr(graph_trial, "replayed", replayed)
    return seen


def model():
    torch.manual_seed(0)
    return nn.Sequential(bottleneck()(), bottleneck()()).double()


def images(seed=1):
    return torch.randn(2, 32, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def runs_as(net):
    return {row.runs_as for row in fusedres.report(net).matched}


@pytest.mark.parametrize(
    "seconds, way",
    [
        ((1.5, 1.0, 1.2, 1.5), "gram"),
        ((1.5, 1.2, 1.0, 1.5), "separate"),
        ((1.0, 1.1, 1.2, 1.0), "unfused"),
        ((1.02, 1.1, 1.0, 1.02), "unfused"),
        ((1.5, 1.3, 1.3, 1.3), "unfused"),
    ],
)
def test_the_fastest_way_is_captured_and_computes_the_same(patching, seconds, way):
    seen = told(patching, *seconds)
    plain, net = model(), fusedres.patch(model())
    graphed = fusedres.graphed(net, images())
    assert len(seen) == len(WAYS) and runs_as(net) == {way}
    for i in range(2):
        for step in (plain, graphed):
            step(images(i)).square().sum().backward()
    for (name, exact), actual in zip(plain.named_parameters(), net.parameters(), strict=True):
        assert_same_float64(actual.grad, exact.grad, name)


def test_the_next_process_captures_once(patching):
    told(patching, 1.5, 1.2, 1.0, 1.5)
    fusedres.graphed(fusedres.patch(model()), images())
    (key,) = [key for key in user_table.table() if key.mode == "cuda graph"]
    assert user_table.table()[key].recipe == "separate" and key.gradients
    seen = told(patching)
    net = fusedres.patch(model())
    fusedres.graphed(net, images())
    assert not seen and runs_as(net) == {"separate"}


def test_inference_has_an_entry_of_its_own(patching):
    told(patching, 1.5, 1.2, 1.0, 1.5)
    fusedres.graphed(fusedres.patch(model()), images())
    told(patching, 1.5, 1.0, 1.2, 1.5)
    net = fusedres.patch(model()).eval()
    fusedres.graphed(net, images())
    assert runs_as(net) == {"gram"}
    assert {key.gradients for key in user_table.table() if key.mode == "cuda graph"} == {True, False}


def test_a_way_without_memory_is_out(patching):
    told(patching, 1.5, 1.2, 1.5)
    right = graph_trial.captured

    def captured(make):
        graphs = right(make)
        if runs_as(net) == {"gram"}:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return graphs

    patching.setattr(graph_trial, "captured", captured)
    net = fusedres.patch(model())
    fusedres.graphed(net, images())
    assert runs_as(net) == {"separate"}


@pytest.mark.parametrize("recipe", [None, "separate"])
def test_nothing_is_tried_of_a_model_that_is_not_on_trial(patching, recipe):
    seen = told(patching)
    net = model() if recipe is None else fusedres.patch(model(), recipe=recipe)
    fusedres.graphed(net, images())
    assert not seen


def test_off(patching):
    patching.setenv("FUSEDRES_TRIAL", "0")
    seen = told(patching)
    net = fusedres.patch(model())
    fusedres.graphed(net, images())
    assert not seen and runs_as(net) == {"unfused"}


def test_the_model_itself_goes_on_by_its_own_trial(patching):
    told(patching, 1.5, 1.2, 1.0, 1.5)
    net = fusedres.patch(model())
    fusedres.graphed(net, images())
    twin = copy.deepcopy(net)
    for m in (net, twin):
        m(images())
        assert {row.code.partition(":")[0] for row in fusedres.report(m).matched} == {"measuring"}


def test_replays_are_timed(patching):
    net = fusedres.patch(model(), recipe="separate")
    graphs = fusedres.graphed(net, images())._graphs
    before = graphs.turn
    assert graph_trial.replayed(graphs) > 0 and graphs.turn - before == graph_trial.REPLAYS


def test_kernels_that_could_not_be_proved_are_not_captured(patching):
    """And nothing is kept: the next process may be able to prove them."""
    patching.setattr(proof, "prove", lambda *args: "no process could be made")
    seen = told(patching)
    net = fusedres.patch(model())
    fusedres.graphed(net, images())
    assert not seen and runs_as(net) == {"unfused"} and not user_table.table()
