"""patch, unpatch, report: what is matched, what is left alone with which code, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from accuracy import assert_same_float64
from block_forms import one_step, ran_as, randomize
from impure_blocks import EFFECTS, IMPURE
from look_alikes import LOOK_ALIKES
from spellings import LEFT_ALONE, MATCHED, InPlaceAdd, SqueezeExcite, TwoConvs
from torch import nn
from training import assert_trained_alike

import fusedres
from fusedres.models import BasicBlock, Bottleneck, ResNet, cifar_resnet, resnet18, resnet50


def wrap(block: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Identity(), block)


@pytest.mark.parametrize("spelling", MATCHED, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("recipe", ["separate", "gram"])
def test_every_spelling_is_matched_and_equal(spelling, recipe):
    torch.manual_seed(0)
    plain = randomize(spelling()).double()
    fused = fusedres.patch(copy.deepcopy(plain), recipe=recipe, strict=True)
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        dy = torch.randn_like(copy.deepcopy(plain)(x))
    expected, actual = one_step(plain, x, dy), one_step(fused, x, dy)
    assert all(row.runs_as in ("separate", "gram") for row in fusedres.report(fused).matched)
    assert_same_float64(actual.y, expected.y, "y")
    assert_same_float64(actual.dx, expected.dx, "dx")
    for name, exact in expected.gradients.items():
        assert_same_float64(actual.gradients[name], exact, name)


@pytest.mark.parametrize(
    ("look_alike", "code"),
    LEFT_ALONE + LOOK_ALIKES + IMPURE,
    ids=[c.__name__ for c, _ in LEFT_ALONE + LOOK_ALIKES + IMPURE],
)
def test_look_alikes_are_left_alone_with_their_code(look_alike, code):
    model = nn.Sequential(InPlaceAdd(), look_alike())
    before = type(model[1])
    fusedres.patch(model)
    assert type(model[1]) is before
    rows = {row.name: row for row in fusedres.report(model).blocks}
    if code == "not_residual":
        assert "1" not in rows
    else:
        assert rows["1"].code.partition(":")[0] == code and not rows["1"].matched


@pytest.mark.parametrize("build", EFFECTS)
def test_patch_has_no_effects_of_a_forward(build):
    """Nor does a dry run keep a later call from having them."""
    model, called = nn.Sequential(InPlaceAdd(), build()), nn.Sequential(InPlaceAdd(), build())
    unwritten = contents(model[1])
    fusedres.patch(model, recipe="separate")
    assert contents(model[1]) == unwritten
    for each in (model, called):
        each(torch.randn(2, 16, 6, 6))
    assert contents(model[1]) == contents(called[1]) != unwritten


def contents(block: nn.Module) -> str:
    names = ("count", "log", "stats")
    return str([getattr(block, name) for name in names if hasattr(block, name)])


def test_patch_returns_the_same_model_and_changes_nothing_visible():
    torch.manual_seed(0)
    model = resnet18(num_classes=4)
    keys, parameters, children = (
        list(model.state_dict()),
        list(model.parameters()),
        list(model.named_modules()),
    )
    assert fusedres.patch(model, recipe="separate") is model
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [(n, id(m)) for n, m in model.named_modules()] == [(n, id(m)) for n, m in children]
    block = model.layer1[0]
    assert isinstance(block, BasicBlock) and type(block).__name__ == "BasicBlock"
    assert type(block).__module__ == BasicBlock.__module__
    assert repr(block).startswith("BasicBlock(")


def test_unpatch_restores_the_exact_classes():
    model = resnet50(num_classes=4)
    classes = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    fusedres.unpatch(fusedres.patch(model))
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert not fusedres.is_patched(model)


def test_patch_twice_is_idempotent_and_takes_new_options():
    model = fusedres.patch(cifar_resnet(20), recipe="separate")
    classes = [type(m) for m in model.modules()]
    fusedres.patch(model, recipe="unfused", exclude="layer1.*")
    rows = {row.name: row for row in fusedres.report(model).blocks}
    assert (rows["layer2.0"].recipe == "unfused" and rows["layer1.0"].code == "excluded") or not rows[
        "layer1.0"
    ].matched
    assert type(model.layer1[0]) is BasicBlock
    fusedres.patch(model, recipe="separate")
    assert [type(m) for m in model.modules()] == classes


def test_include_and_exclude_take_patterns():
    model = fusedres.patch(cifar_resnet(20), include=["layer1.*", "layer3.*"], exclude="*.2")
    names = [row.name for row in fusedres.report(model).matched]
    assert names == ["layer1.0", "layer1.1", "layer3.0", "layer3.1"]


def test_dry_run_changes_nothing_and_reports():
    model = cifar_resnet(20)
    assert fusedres.patch(model, dry_run=True, exclude="layer1.0", recipe="separate") is model
    assert not fusedres.is_patched(model) and type(model.layer1[1]) is BasicBlock
    report = fusedres.report(model)
    assert len(report.matched) == 9 and report.skipped[0].code == "excluded"
    assert {row.recipe for row in report.matched} == {"separate"}


def test_strict_raises_names_the_block_and_changes_nothing():
    model = nn.Sequential(InPlaceAdd(), SqueezeExcite())
    with pytest.raises(fusedres.UnsupportedModelError, match=r"1 of 2 blocks.*1 \[unsupported_op"):
        fusedres.patch(model, strict=True)
    assert not fusedres.is_patched(model)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"recipe": "fastest"}, ValueError),
        ({"backend": "fpga"}, fusedres.BackendUnavailableError),
    ],
    ids=["recipe", "backend"],
)
def test_unknown_names_raise_and_change_nothing(options, error):
    model = cifar_resnet(20)
    with pytest.raises(error, match=r"choose from|found auto"):
        fusedres.patch(model, **options)
    assert not fusedres.is_patched(model)


def test_what_is_no_module_raises_type_error():
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, found int"):
        fusedres.patch(3)


def test_a_model_without_residual_blocks_raises():
    with pytest.raises(fusedres.UnsupportedModelError, match="no residual block found in Linear"):
        fusedres.patch(nn.Linear(2, 2))


def test_wrapped_models_are_refused_with_the_right_order():
    model = cifar_resnet(20)
    with pytest.raises(fusedres.UnsupportedModelError, match=r"first, then torch\.compile"):
        fusedres.patch(torch.compile(model))
    with pytest.raises(fusedres.UnsupportedModelError, match=r"fusedres\.patch\(model\.module\)"):
        fusedres.patch(nn.DataParallel(model))
    with pytest.raises(fusedres.UnsupportedModelError, match="before converting it"):
        fusedres.patch(torch.jit.trace(model.eval(), torch.randn(1, 3, 8, 8)))
    assert not fusedres.is_patched(model)


def test_unpatch_refuses_where_another_tool_swapped_again():
    model = fusedres.patch(wrap(InPlaceAdd()), recipe="separate")
    other = type.__new__(type(type(model[1])), "Swapped", (type(model[1]),), {})
    object.__dict__["__class__"].__set__(model[1], other)  # past the property that keeps the patch on top
    with pytest.raises(fusedres.UnsupportedModelError, match="Swapped"):
        fusedres.unpatch(model)
    assert type(model[1]) is other


def test_a_norm_shared_between_blocks_is_left_alone():
    model = nn.Sequential(InPlaceAdd(), InPlaceAdd(), InPlaceAdd())
    model[1].bn1 = model[0].bn1
    fusedres.patch(model)
    codes = {row.name: row.code for row in fusedres.report(model).blocks if not row.matched}
    assert codes == {"0": "shared_module", "1": "shared_module"}


def test_a_block_used_twice_is_patched_and_equal():
    torch.manual_seed(0)
    block = randomize(InPlaceAdd()).double()
    plain = nn.Sequential(block, block)
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate", strict=True)
    x, dy = torch.randn(2, 16, 6, 6, dtype=torch.float64), torch.randn(2, 16, 6, 6, dtype=torch.float64)
    expected, actual = one_step(plain, x, dy), one_step(fused, x, dy)
    assert_same_float64(actual.dx, expected.dx)
    for name, exact in expected.gradients.items():
        assert_same_float64(actual.gradients[name], exact, name)
    for name, exact in expected.buffers.items():
        assert_same_float64(actual.buffers[name].double(), exact.double(), name)


def test_deepcopy_is_independent():
    model = fusedres.patch(wrap(randomize(InPlaceAdd())), recipe="separate")
    twin = copy.deepcopy(model)
    x = torch.randn(2, 16, 6, 6)
    before = model.eval()(x)
    for p in twin.parameters():
        p.data.zero_()
    assert torch.equal(model(x), before)
    assert not torch.equal(twin.eval()(x), before)
    assert fusedres.is_patched(twin)


def test_a_pickled_model_computes_the_same_in_a_fresh_process(tmp_path):
    model = fusedres.patch(cifar_resnet(20).eval(), recipe="separate")
    x = torch.randn(1, 3, 8, 8)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, x, y = torch.load(sys.argv[1], weights_only=False);"
        "import fusedres; assert fusedres.is_patched(model); assert torch.equal(model(x), y);"
        "assert all(row.runs_as == 'separate' for row in fusedres.report(model).blocks)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)
    assert fusedres.is_patched(pickle.loads(pickle.dumps(model)))


SHALLOW = (1, 1, 1, 1)


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("build", "recipe"),
    [
        (resnet18, "separate"),
        (partial(ResNet, Bottleneck, SHALLOW), "separate"),
        (resnet50, "gram"),
    ],
    ids=["resnet18-separate", "bottlenecks-separate", "resnet50-gram"],
)
def test_three_sgd_steps_equal_unpatched_in_float64(build, recipe):
    torch.manual_seed(0)
    plain = build(num_classes=5, zero_init_residual=True).double()  # else noise grows tenfold a step
    fused = fusedres.patch(copy.deepcopy(plain), recipe=recipe, strict=True)
    images, labels = torch.randn(3, 6, 3, 48, 48, dtype=torch.float64), torch.randint(5, (6,))
    assert_trained_alike(plain, fused, images, lambda y: nn.functional.cross_entropy(y, labels))


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("block", "depths", "dtype"),
    [
        (BasicBlock, SHALLOW, torch.float32),
        (Bottleneck, (3, 4, 6, 3), torch.bfloat16),  # ResNet-50, where most rounding errors add up
    ],
    ids=["basic-fp32", "resnet50-bf16"],
)
def test_model_outputs_in_lower_precision_are_as_accurate_as_eager(block, depths, dtype):
    torch.manual_seed(0)
    # A fresh BN scales by 1 - 5e-6: sums of two bfloat16s then lie just below a midpoint, and one rounding is biased
    # where eager's two are not.
    model = randomize(ResNet(block, depths, num_classes=5)).to(dtype)
    report = fusedres.verify(model, torch.randn(4, 3, 40, 40).to(dtype))
    assert report, str(report)


def test_options_of_unfused_and_auto():
    model = fusedres.patch(wrap(InPlaceAdd()), recipe="unfused")
    model(torch.randn(2, 16, 6, 6))
    assert ran_as(model, "unfused")
    fusedres.patch(model, recipe="auto", backend="reference")
    model(torch.randn(2, 16, 6, 6))
    (row,) = fusedres.report(model).blocks
    assert row.runs_as == "unfused" and row.code.startswith(("too_small:", "native_missing"))


def test_gram_falls_to_separate_without_an_expansion():
    model = fusedres.patch(wrap(BasicBlock(16, 16)), recipe="gram")
    model(torch.randn(2, 16, 6, 6))
    (row,) = fusedres.report(model).blocks
    assert row.runs_as == "separate" and row.code == "no_1x1_expansion"


def test_report_shows_a_table_and_plain_data():
    model = fusedres.patch(nn.Sequential(Bottleneck(32, 8), SqueezeExcite(32)), recipe="gram")
    model(torch.randn(2, 32, 4, 4))
    report = fusedres.report(model)
    assert bool(report) and len(report.skipped) == 1
    text = str(report)
    assert "matched 1 of 2 blocks" in text and "gram" in text and "unsupported_op" in text
    data = report.as_dict()
    assert data["matched"] == 1 and data["blocks"][0]["runs_as"] == "gram"
    assert not fusedres.report(TwoConvs())
