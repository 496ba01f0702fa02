"""warmup: runs what a step will run, and leaves everything as it was."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from block_forms import bottleneck
from called_ops import see_ops
from torch import nn

import fusedres
from fusedres.ops.contract import op_name


class Noisy(nn.Module):
    """Two bottlenecks, dropout that draws random numbers, and a buffer that every call puts a new tensor into."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = bottleneck()(), bottleneck()()
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.calls = self.calls + 1
        return {"y": self.second(self.dropout(self.first(x))), "count": self.calls}


@pytest.fixture
def model():
    return fusedres.patch(Noisy(), recipe="gram", backend="reference")


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 32, 5, 5).to(memory_format=torch.channels_last)


def served_ops(monkeypatch, run) -> set[tuple[str, bool]]:
    """The raw ops called while `run` runs, each with whether a mask or dz was asked for, which compiles otherwise."""
    with monkeypatch.context() as patching:
        seen = see_ops(patching)
        run()
    forms = [(*(a for a in op if isinstance(a, bool)), *(a is None for a in op)) for op in seen]
    return {(op_name(type(op)), *form) for op, form in zip(seen, forms, strict=True)}


def step(model, x):
    model(x)["y"].sum().backward()


def evaluate(model, x):
    with torch.no_grad():
        model(x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_runs_every_op_of_a_step_and_of_inference(model, x, training, monkeypatch):
    model.train(training)
    warmed = served_ops(monkeypatch, lambda: fusedres.warmup(model, x))
    for run in (step, evaluate):
        needed = served_ops(monkeypatch, lambda run=run: run(copy.deepcopy(model), x))
        assert needed and needed <= warmed


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_everything_is_left_as_it_was(model, x, training):
    model.train(training)
    model.first.bn1.eval()
    step(model, x)
    state, example = {k: v.clone() for k, v in model.state_dict().items()}, x.clone()
    tensors = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    gradients = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    generator = torch.get_rng_state()
    assert fusedres.warmup(model, x) is None
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert tensors == {n: id(t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    for name, p in model.named_parameters():
        kept, values = gradients[name]
        assert p.grad is kept and torch.equal(kept, values), name
    assert modes == {name: m.training for name, m in model.named_modules()}
    assert torch.equal(generator, torch.get_rng_state())
    assert torch.equal(x, example) and x.grad is None and torch.is_grad_enabled()


def test_buffers_come_back_after_an_exception(model, x):
    model.dropout.register_forward_hook(lambda *args: 1 / 0)
    before = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(ZeroDivisionError):
        fusedres.warmup(model, x)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_hooks_that_wait_for_gradients_are_not_set_off(model, x):
    """As of an optimiser that steps in backward."""
    called = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(called.append)
    fusedres.warmup(model, (x,))
    assert not called and all(p.grad is None for p in model.parameters())


def test_frozen_model_and_input_with_gradient(model, x, monkeypatch):
    """Gradients flow where they are wanted only: here into the input."""
    model.requires_grad_(False)
    x.requires_grad_()
    warmed = served_ops(monkeypatch, lambda: fusedres.warmup(model, x))
    assert "conv1x1_gram_backward_input" in {op for op, *_ in warmed}
    assert x.grad is None


def test_unpatched_models_and_capture_are_refused(model, x, monkeypatch):
    with pytest.raises(fusedres.UnsupportedModelError, match="patch"):
        fusedres.warmup(Noisy(), x)
    with pytest.raises(TypeError):
        fusedres.warmup(lambda x: x, x)
    module = importlib.import_module("fusedres.measuring.warmup")
    monkeypatch.setattr(module, "cuda_devices", lambda tensors: [torch.device("cuda")])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="captured"):
        fusedres.warmup(model, x)
