"""What a trial must not break: steps of other shapes than one forward and one backward, and what comes between."""

import copy
import json

import pytest
import torch
from accuracy import assert_same_float64
from same_model import images
from torch import nn
from torch.utils.checkpoint import checkpoint
from trials_on import FASTER, STEPS, block, row, told, trials_on, without_proof, x_for

import fusedres
from fusedres.autograd.function import ResidualBlock
from fusedres.blocks import choice, user_table
from fusedres.blocks.unfused import Measured
from fusedres.blocks.user_table import Entry
from fusedres.patching import call as calls
from fusedres.trials import on_block


@pytest.fixture
def patching(tmp_path):
    with trials_on(tmp_path) as patching:
        without_proof(patching)
        told(patching, FASTER.__getitem__)
        yield patching


def train(model, steps=STEPS, **options):
    for _ in range(steps):
        model(x_for(**options)).sum().backward()


@pytest.mark.parametrize("known", ["nothing", "an entry", "a trial that goes on"])
def test_a_graph_of_torch_compile_holds_nothing_of_it(patching, known):
    model = fusedres.patch(block())
    train(model, {"nothing": 0, "an entry": STEPS, "a trial that goes on": 3}[known])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same_float64(compiled(x_for()), block()(x_for()))
    torch.export.export(model, (x_for(),), strict=True)


def test_two_forwards_before_a_backward(patching):
    """torch's batch_norm saves the running statistics, and does not mind that a later call moves them."""
    plain, fused = block(), fusedres.patch(block())
    for i in range(STEPS):
        for model in (plain, fused):
            first, second = (model(x_for(seed=2 * i + j)) for j in range(2))
            (first.sum() + second.square().sum()).backward()
    for (name, exact), actual in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert_same_float64(actual.grad, exact.grad, name)
    assert row(fused).runs_as == "separate"


def test_a_candidate_without_memory_in_its_backward_is_out_after_it(patching):
    right, raised = ResidualBlock.backward, []

    def backward(ctx, dy):
        if ctx.recipe == "separate":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(ctx, dy)

    patching.setattr(ResidualBlock, "backward", staticmethod(backward))
    model = fusedres.patch(block())
    for _ in range(STEPS):
        try:
            train(model, 1)
        except torch.OutOfMemoryError as error:
            raised.append(error)
    assert len(raised) == 1 and row(model).runs_as == "gram"


def test_a_device_that_nothing_serves(patching):
    model = fusedres.patch(block()).to("meta")
    assert model(x_for().to("meta")).device.type == "meta"


def test_a_checkpoint_that_began_while_measuring_was_off(patching):
    model = fusedres.patch(nn.Sequential(block(), block(1)))
    patching.setattr(torch.backends.cudnn, "deterministic", True)
    waiting = checkpoint(model[0], x_for().requires_grad_(), use_reentrant=False)
    patching.setattr(torch.backends.cudnn, "deterministic", False)
    train(model[1])
    waiting.sum().backward()


def test_checkpoints_that_wait_keep_their_recipe(patching):
    model = fusedres.patch(block())
    waiting = checkpoint(model, x_for().requires_grad_(), use_reentrant=False)
    train(model)
    another = checkpoint(model, x_for(seed=2).requires_grad_(), use_reentrant=False)
    (waiting.sum() + another.sum()).backward()


def test_a_checkpoint_takes_what_warmup_found_though_it_ran_before(patching):
    model = fusedres.patch(block())

    def checkpointed():
        checkpoint(model, x_for().requires_grad_(), use_reentrant=False).sum().backward()
        return row(model).runs_as

    assert checkpointed() == "unfused"
    fusedres.warmup(model, x_for(), measure=True)
    assert checkpointed() == "separate"


def counted_warmup(model, x):
    count = []
    handle = model.register_forward_pre_hook(lambda *args: count.append(1))
    fusedres.warmup(model, x, measure=True)
    handle.remove()
    return len(count)


def test_an_odd_batch_does_not_keep_the_others_waiting(patching):
    model = fusedres.patch(block())
    train(model)
    train(model, 1, batch=2)
    assert counted_warmup(model, x_for()) < 100
    assert counted_warmup(model, x_for()) <= 4


def test_a_layer_that_is_frozen_in_mid_trial_does_not_keep_the_others_waiting(patching):
    model = fusedres.patch(nn.Sequential(block(), block(1)))
    train(model, 4)
    model[0].eval().requires_grad_(False)
    train(model, 2 * STEPS)
    assert model[1].__dict__["_fusedres"].on_trial.whole.is_over(True)


def test_warmup_ends_where_nothing_may_be_measured(patching):
    model = fusedres.patch(block())
    train(model, 1)
    patching.setattr(torch.backends.cudnn, "deterministic", True)
    assert counted_warmup(model, x_for()) == 2


def test_unpatching_one_block_in_mid_trial_leaves_the_others(patching):
    model = fusedres.patch(nn.Sequential(block(), block(1)))
    train(model, 3)
    fusedres.unpatch(model[0])
    train(model)
    assert row(model).runs_as == "separate" and row(model).code is None


def test_a_model_called_twice_in_a_step_is_one_step(patching):
    seen = []
    told(patching, FASTER.__getitem__, whole=lambda fused: seen.append(fused) or (1.1 if fused else 1.0))
    model = fusedres.patch(nn.Sequential(block(), block(1)))
    with pytest.warns(UserWarning, match="0.91x"):
        for _ in range(2 * STEPS):
            (model(x_for()).sum() + model(x_for(seed=2)).sum()).backward()
    assert seen == [True, False, False, True, True, False, False, True, True, False]


@pytest.mark.parametrize("ratio", [None, "1.2", [1.0], float("nan")])
def test_an_entry_that_makes_no_sense_is_said_and_not_used(patching, tmp_path, ratio):
    model = fusedres.patch(block())
    train(model)
    data = json.loads((tmp_path / "table.json").read_text())
    for entry in data["entries"]:
        entry["found"]["ratio"] = ratio
    (tmp_path / "table.json").write_text(json.dumps(data))
    on_block.registry.forget()
    user_table.forget()
    again = fusedres.patch(block())
    with pytest.warns(RuntimeWarning, match="a ratio is no number"):
        train(again, 1)
    assert row(again).code == "measuring:0/7"


@pytest.mark.parametrize("recipe", ["gram", "together"])
def test_an_entry_for_a_recipe_that_the_block_has_not_is_not_used(patching, recipe):
    plain = fusedres.models.BasicBlock(16, 16).double()
    model = fusedres.patch(copy.deepcopy(plain))
    model(images(3, 16, 6, 6)).sum().backward()
    user_table.write({model.__dict__["_fusedres"].on_trial.latest.key: Entry(recipe, 1.5, "trial")})
    on_block.registry.forget()
    again = fusedres.patch(copy.deepcopy(plain))
    assert_same_float64(again(images(3, 16, 6, 6)), plain(images(3, 16, 6, 6)))
    assert row(again).code == "measuring:0/7"


def test_a_backward_of_one_parameter_alone_gives_no_time(patching):
    seen = []
    patching.setattr(on_block.Trial, "tell", lambda self, ticket, seconds: seen.append(ticket.arm))
    model = fusedres.patch(block())
    y = model(x_for()).sum()
    torch.autograd.grad(y, model.bn3.bias, retain_graph=True)
    y.backward()
    assert not seen


def test_ever_other_sizes_end_in_the_original_forward(patching):
    model = fusedres.patch(block())
    for side in range(4, 4 + on_block.MOST_OPEN + 3):
        model(images(2, 32, side, side)).sum().backward()
    assert row(model).code == "not_measured_here:too many kinds of calls at once"


def test_blocks_that_were_loaded_are_one_model(patching, tmp_path):
    torch.save(fusedres.patch(nn.Sequential(block(), block(1))), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    fusedres.warmup(loaded, x_for(), measure=True)
    wholes = {id(m.__dict__["_fusedres"].on_trial.whole) for m in loaded}
    assert len(wholes) == 1
    assert any("2 blocks of a model together" in key.call for key in user_table.table())


def test_a_small_call_that_a_table_is_for_is_not_read_whatever_trials_found(patching):
    """Every call of a small model would pay for it."""
    table = {("cpu", "native", torch.float64, True): (Measured("separate", 10**9, 16, ""),)}
    train(fusedres.patch(block()))
    patching.setattr(choice, "TABLE", table)
    patching.setattr(calls, "read", None)
    model = fusedres.patch(block())
    train(model, 2)
    assert row(model).code.startswith("too_small")
