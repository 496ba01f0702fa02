"""What PyTorch does to a model, done to a patched one: compiled, traced, scripted, exported, called functionally."""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import assert_same_float64
from spellings import FunctionalReLU
from torch import nn

import fusedres
from fusedres.models import cifar_resnet


def scripted(model, x):
    return torch.jit.script(model)


def traced(model, x):
    return torch.jit.trace(model, x)


def symbolically_traced(model, x):
    return torch.fx.symbolic_trace(model)


def exported(model, x):
    return torch.export.export(model, (x,)).module()


def compiled(model, x):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.fixture
def pair():
    torch.manual_seed(0)
    plain = cifar_resnet(20).double().eval()
    return plain, fusedres.patch(copy.deepcopy(plain), recipe="separate")


def test_scripting_finds_the_names_that_the_original_forward_uses():
    plain = FunctionalReLU().eval()
    fused = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    x = torch.randn(2, 16, 6, 6)
    assert torch.equal(torch.jit.script(fused)(x), plain(x))


@pytest.mark.no_cover
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "transform", [scripted, traced, symbolically_traced, exported, compiled], ids=lambda f: f.__name__
)
def test_a_transformed_model_computes_the_same(pair, transform):
    plain, fused = pair
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert_same_float64(transform(fused, x)(x), plain(x))
    assert fusedres.is_patched(fused)
    fused(x)
    assert {row.runs_as for row in fusedres.report(fused).blocks} == {"separate"}


def test_a_compiled_model_trains_the_same(pair):
    plain, fused = pair
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for model in (plain.train(), compiled(fused.train(), x)):
        model(x).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert_same_float64(q.grad, p.grad, name)
    for (name, p), q in zip(plain.named_buffers(), fused.buffers(), strict=True):
        assert_same_float64(q.double(), p.double(), name)


def test_functional_call_reads_the_given_parameters(pair):
    plain, fused = pair
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    other = {name: p.detach() * 1.5 for name, p in plain.named_parameters()}
    expected = torch.func.functional_call(plain, other, (x,))
    assert_same_float64(torch.func.functional_call(fused, other, (x,)), expected)


def test_checkpointing_recomputes_the_same(pair):
    plain, fused = pair
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for model in (plain.train(), fused.train()):
        stage = model.stem(x)
        out = torch.utils.checkpoint.checkpoint(model.layer1, stage, use_reentrant=False)
        out.square().sum().backward()
    for (name, p), q in zip(plain.layer1.named_parameters(), fused.layer1.parameters(), strict=True):
        assert_same_float64(q.grad, p.grad, name)
    for (name, p), q in zip(plain.layer1.named_buffers(), fused.layer1.buffers(), strict=True):
        assert_same_float64(q.double(), p.double(), name)
    assert fused.layer1[0].bn1.num_batches_tracked == 2


def test_two_forwards_before_one_backward(pair):
    plain, fused = pair
    first, second = torch.randn(2, 2, 3, 16, 16, dtype=torch.float64)
    for model in (plain.train(), fused.train()):
        a, b = model(first), model(second)
        (a.square().sum() + b.sum()).backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert_same_float64(q.grad, p.grad, name)


def test_parameters_replaced_after_patching_are_read(pair):
    plain, fused = pair
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for model in (plain, fused):
        block = model.layer2[1]
        block.conv1.weight = nn.Parameter(block.conv1.weight.detach() * 2)
        block.bn2.eps = 0.1
        block.bn1.running_mean.add_(1)
    assert_same_float64(fused(x), plain(x))
    assert {row.runs_as for row in fusedres.report(fused).blocks} == {"separate"}


def test_an_in_place_operation_on_the_output_is_legal(pair):
    _, fused = pair
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    y = fused.stem(x)
    z = fused.layer1[0](y)
    z += 1
    z.sum().backward()
    assert fused.layer1[0].conv1.weight.grad is not None


def test_an_input_changed_in_place_before_backward_raises_as_unpatched(pair):
    _, fused = pair
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64, requires_grad=True) * 1
    y = fused.layer1[0](x)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
