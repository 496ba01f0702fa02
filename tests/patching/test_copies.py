"""Copies of a patched model, parts taken from it, and other ways of calling it compute what the unpatched one's do."""

from __future__ import annotations

import copy
import copyreg
import inspect
import os
import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from accuracy import assert_same_float64
from block_forms import ran_as
from same_model import assert_same_buffers, assert_same_step, images, pair, step
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.models import Bottleneck, cifar_resnet
from fusedres.modules.derived_class import STATE
from fusedres.patching.older_pickles import Dropped
from fusedres.patching.state import BlockState


def small() -> nn.Module:
    return cifar_resnet(20, num_classes=3)


def pictures(n: int = 3):
    return images(n, 3, 12, 12)


def parts(model: nn.Module, upto: str) -> nn.Sequential:
    """The children of a model up to one of them, in order, as feature extractors take them."""
    children = OrderedDict()
    for name, child in model.named_children():
        children[name] = child
        if name == upto:
            break
    return nn.Sequential(children)


@pytest.mark.parametrize("recipe", ["separate", "gram"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_trains_the_same_and_apart(duplicate, recipe):
    plain, fused = pair(lambda: Bottleneck(16, 4), recipe)
    fused(images())
    plain(images())
    twin = duplicate(fused)
    before = {k: v.clone() for k, v in fused.state_dict().items()}
    assert fusedres.is_patched(twin) and list(twin.state_dict()) == list(plain.state_dict())
    assert_same_step(plain, twin)
    assert ran_as(twin, recipe)
    assert all(torch.equal(v, before[k]) for k, v in fused.state_dict().items())
    assert type(fusedres.unpatch(twin)) is Bottleneck


def test_a_shallow_copy_shares_its_parameters():
    plain, fused = pair()
    assert_same_step(plain, copy.copy(fused))
    assert fused.bn1.num_batches_tracked == 1


def test_a_pickled_model_trains_the_same_in_a_fresh_process(tmp_path):
    plain, fused = pair(lambda: Bottleneck(16, 4), "gram")
    expected = step(plain, images())
    torch.save((fused, images(), expected.dx, expected.gradients, expected.buffers), tmp_path / "block.pt")
    code = (
        "import sys, torch\n"
        "block, x, dx, gradients, buffers = torch.load(sys.argv[1], weights_only=False)\n"
        "from same_model import step\n"
        "import fusedres\n"
        "assert fusedres.is_patched(block)\n"
        "found = step(block, x)\n"
        "assert fusedres.report(block).blocks[0].runs_as == 'gram'\n"
        "near = lambda a, b: (a.double() - b.double()).norm() <= 1e-10 * b.double().norm()\n"
        "assert near(found.dx, dx)\n"
        "assert all(near(found.gradients[k], v) for k, v in gradients.items())\n"
        "assert all(near(found.buffers[k], v) for k, v in buffers.items())\n"
    )
    helpers = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if f"{os.sep}tests{os.sep}" in path),
    }
    subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path / "block.pt")], check=True, env=helpers)


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_models(average):
    options = {} if average == "swa" else {"multi_avg_fn": get_ema_multi_avg_fn(0.5), "use_buffers": True}
    averaged = []
    for model in pair(small):
        mean = AveragedModel(model, **options)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            model(pictures()).square().sum().backward()
            optimizer.step()
            mean.update_parameters(model)
        if average == "swa":
            update_bn([pictures()], mean)
        averaged.append(mean)
    plain, fused = averaged
    for (name, exact), actual in zip(plain.state_dict().items(), fused.state_dict().values(), strict=True):
        assert_same_float64(actual.double(), exact.double(), name)
    assert_same_float64(fused.eval()(pictures()), plain.eval()(pictures()))
    assert fusedres.is_patched(fused) and ran_as(fused.module, "separate")


@pytest.mark.parametrize("order", ["extract-patch", "patch-extract"])
def test_feature_extractors(order):
    plain, _ = pair(small)
    model = copy.deepcopy(plain)
    if order == "patch-extract":
        fusedres.patch(model, recipe="separate", exclude="stem")
    extractor = parts(model, "layer2")
    if order == "extract-patch":
        fusedres.patch(extractor, recipe="separate")
        assert not fusedres.is_patched(nn.Sequential(model.layer3)) and fusedres.is_patched(model.layer1)
    reference = parts(plain, "layer2")
    assert_same_step(reference, extractor, pictures())
    assert all(row.runs_as == "separate" for row in fusedres.report(extractor).matched)
    assert len(fusedres.report(extractor).matched) == 6


def test_functional_call_moves_the_given_buffers():
    plain, fused = pair()
    results = []
    for block in (plain, fused):
        state = {
            k: v.detach().clone() * (2 if v.is_floating_point() else 1) for k, v in block.state_dict().items()
        }
        kept = {k: v.clone() for k, v in block.state_dict().items()}
        y = torch.func.functional_call(block, state, (images(),))
        assert all(torch.equal(v, kept[k]) for k, v in block.state_dict().items())
        results.append({"y": y, **state})
    for name, exact in results[0].items():
        assert_same_float64(results[1][name].double(), exact.double(), name)
    assert results[1]["bn1.num_batches_tracked"] == 1 and ran_as(fused, "separate")


@pytest.mark.parametrize("recipe", ["separate", "gram"])
def test_gradients_through_an_inner_step(recipe):
    """As in meta-learning: the parameters of the second call are themselves a function of the parameters."""
    plain, fused = pair(lambda: Bottleneck(16, 4), recipe)
    for block in (plain, fused):
        parameters = dict(block.named_parameters())
        loss = block(images()).square().mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        moved = {k: p - 0.1 * g for (k, p), g in zip(parameters.items(), gradients, strict=True)}
        torch.func.functional_call(block, moved, (images(seed=8),)).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        assert_same_float64(q[1].grad, p.grad, name)
    assert ran_as(fused, recipe)


@pytest.mark.parametrize("recipe", ["separate", "gram"])
def test_a_batch_of_gradients(recipe):
    plain, fused = pair(lambda: Bottleneck(16, 4), recipe)
    dy = images(4, 3, 16, 6, 6)
    found = []
    for block in (plain, fused):
        x = images().requires_grad_()
        found.append(torch.autograd.grad(block(x), (x, *block.parameters()), dy, is_grads_batched=True))
    for exact, actual in zip(*found, strict=True):
        assert_same_float64(actual, exact)
    assert ran_as(fused, recipe)


@pytest.mark.parametrize("recipe", ["separate", "gram"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing(recipe, reentrant):
    plain, fused = pair(lambda: Bottleneck(16, 4), recipe)
    gradients = []
    for block in (plain, fused):
        x = images().requires_grad_()
        checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
        gradients.append({"x": x.grad, **{k: p.grad for k, p in block.named_parameters()}})
    for name, exact in gradients[0].items():
        assert_same_float64(gradients[1][name], exact, name)
    assert_same_buffers(plain, fused)
    assert fused.bn1.num_batches_tracked == 2 and ran_as(fused, recipe)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_patching_without_grad_mode(context):
    plain, _ = pair()
    fused = copy.deepcopy(plain)
    with context():
        fusedres.patch(fused, recipe="separate", strict=True)
        assert_same_float64(fused(images()).clone(), plain(images()).clone())
        assert ran_as(fused, "separate")
    assert_same_step(plain, fused)


def test_the_signature_stays():
    plain, fused = pair()
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    assert inspect.signature(type(fused)) == inspect.signature(type(plain))
    assert fused.forward.__doc__ == plain.forward.__doc__ and repr(fused) == repr(plain)


def reduced(*made):
    """An object that is pickled as that."""
    return type("Reduced", (), {"__reduce__": lambda self: made})()


@pytest.mark.parametrize("name", ["plan\nBlockPlan", "contents\nWatched", "structure\nModuleAttributes"])
def test_a_pickle_in_which_older_code_kept_its_plan(name):
    block = fusedres.patch(Bottleneck(16, 4).double(), recipe="separate")
    options = {"plan": reduced(Dropped, ("conv1",)), "recipe": "separate", "backend": "auto"}
    options |= {"runs_as": None, "reason": None}
    vars(block)[STATE] = reduced(copyreg._reconstructor, (BlockState, object, None), options)
    written = pickle.dumps(block, protocol=2)  # of those with the names of classes as text
    stand_in = b"cfusedres.patching.older_pickles\nDropped\n"
    assert written.count(stand_in) == 1
    loaded = pickle.loads(written.replace(stand_in, f"cfusedres.patching.{name}\n".encode()))
    loaded(images())
    assert fusedres.report(loaded).blocks[0].runs_as == "separate"
