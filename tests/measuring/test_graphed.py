"""graphed: replays are steps of the model, bit by bit, and leave alone what a step leaves alone.

`cuda_graph_stand_in.py` stands for CUDA's graphs; `tests/native/test_gpu_graphed.py` has the real ones.
"""

from __future__ import annotations

import copy

import cuda_graph_stand_in
import pytest
import torch
from block_forms import bottleneck
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fusedres
from fusedres.measuring.capturable import WRAPPERS


@pytest.fixture
def cuda(monkeypatch):
    return cuda_graph_stand_in.install(monkeypatch)


class Net(nn.Module):
    """Two bottlenecks and a head; one parameter has no part in the output, one is frozen."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = bottleneck()(), bottleneck()()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(32, 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        return self.head(self.dropout(self.second(self.first(x))).mean((2, 3)))


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 32, 5, 5).contiguous(memory_format=torch.channels_last)


def patched(model: nn.Module, recipe: str | None) -> nn.Module:
    return model if recipe is None else fusedres.patch(model, recipe=recipe, backend="reference")


def assert_equal_states(model: nn.Module, other: nn.Module) -> None:
    for (name, t), u in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(t, u), name
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or (torch.equal(p.grad, q.grad) and p.grad.stride() == q.grad.stride()), name


@pytest.mark.parametrize("recipe", [None, "separate", "gram"])
def test_training_is_what_it_is_without_graphs(cuda, recipe):
    """Gradients of two steps are added before the optimiser moves; replays read the parameters that it wrote."""
    torch.manual_seed(3)
    model = patched(Net(dropout=0.5), recipe)
    eager = copy.deepcopy(model)
    graphed = fusedres.graphed(model, images())
    batches = [images() for _ in range(6)]
    for step, net in ((graphed, model), (eager, eager)):
        torch.manual_seed(4)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for i, x in enumerate(batches):
            step(x).square().sum().backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=i == 3)
    assert cuda.captures == 2, "replays of one forward and one backward"
    assert_equal_states(model, eager)
    if recipe is not None:
        assert {row.runs_as for row in fusedres.report(model).blocks} == {recipe}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_capturing_leaves_everything_as_it_was(cuda, training):
    model, x = patched(Net(dropout=0.5), "separate").train(training), images()
    model(x).sum().backward() if training else None
    before, example, generator = copy.deepcopy(model), x.clone(), torch.get_rng_state()
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    tensors = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    graphed = fusedres.graphed(model, x)
    assert_equal_states(model, before)
    assert tensors == {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert torch.equal(generator, torch.get_rng_state())
    assert torch.equal(x, example) and x.grad is None and torch.is_grad_enabled()
    assert model.training is training and "forward" not in vars(model)
    graphed(images())
    assert torch.equal(x, example), "the example is not the memory of the graph"


def test_random_numbers_are_new_in_each_replay(cuda):
    graphed, x = fusedres.graphed(Net(dropout=0.5), images()), images()
    assert not torch.equal(graphed(x), graphed(x))


@pytest.mark.parametrize("recipe", [None, "gram"])
@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode", "backward=False"])
def test_inference(cuda, how, recipe):
    model = patched(Net(), recipe)
    model.train(how != "eval")
    eager = copy.deepcopy(model)
    if how in ("no_grad", "inference_mode"):
        with getattr(torch, how)():
            graphed = fusedres.graphed(model, images())
    else:
        graphed = fusedres.graphed(model, images(), backward=False if how == "backward=False" else None)
    assert cuda.captures == 1
    for x in (images(), images()):
        y = graphed(x)
        assert torch.equal(y, eager(x)) and not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(graphed(x), eager(x))
    assert_equal_states(model, eager)


def test_a_forward_in_evaluation_with_a_backward(cuda):
    """As for a gradient by the input, which the frozen model hands on."""
    model = patched(Net().eval().requires_grad_(False), "separate")
    graphed = fusedres.graphed(model, images().requires_grad_(), backward=True)
    for x in (images().requires_grad_(), images().requires_grad_()):
        (found,) = torch.autograd.grad(graphed(x).square().sum(), x)
        (expected,) = torch.autograd.grad(model(x).square().sum(), x)
        assert torch.equal(found, expected)


def test_each_call_has_outputs_of_its_own_unless_asked_otherwise(cuda):
    model = Net().eval()
    graphed, shared = (fusedres.graphed(model, images(), copy_outputs=own) for own in (True, False))
    first, second = images(), images()
    y = graphed(first)
    kept = y.clone()
    graphed(second)
    assert torch.equal(y, kept)
    y = shared(first)
    shared(second)
    assert torch.equal(y, model(second)) and not torch.equal(y, model(first))


def test_gradients_that_were_handed_out_stay(cuda):
    model = Net()
    graphed = fusedres.graphed(model, images())
    weights = [p for p in model.parameters() if p.requires_grad and p is not model.unused]
    found = torch.autograd.grad(graphed(images()).sum(), weights)
    kept = [g.clone() for g in found]
    graphed(images()).square().sum().backward()
    assert all(torch.equal(g, k) for g, k in zip(found, kept, strict=True))


def test_no_backward_of_a_replaced_forward(cuda):
    graphed = fusedres.graphed(Net(), images())
    first, second = graphed(images()), graphed(images())
    with pytest.raises(fusedres.CaptureError, match="another forward ran since its own \\(1"):
        first.sum().backward()
    loss = second.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(fusedres.CaptureError, match="it ran already"):
        loss.backward()
    y = graphed(images())
    with torch.no_grad():
        graphed(images())
    with pytest.raises(fusedres.CaptureError, match="another forward"):
        y.sum().backward()


class Several(nn.Module):
    """Several inputs in a dictionary, constants, and outputs of which one has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, given, scale, flag=None):
        y = self.linear(given["a"]) * scale + given["b"]
        return {"y": y, "places": y.argmax(1), "n": 3, "z": (y * 2, None)}


def test_arguments_and_results_of_any_form(cuda):
    model = Several()
    make = lambda: ({"a": torch.randn(2, 4), "b": torch.randn(2, 4)}, 2.0)  # noqa: E731
    graphed = fusedres.graphed(model, make())
    args = make()
    found, expected = graphed(*args), model(*args)
    assert torch.equal(found["y"], expected["y"]) and torch.equal(found["places"], expected["places"])
    assert torch.equal(found["z"][0], expected["z"][0]) and (found["n"], found["z"][1]) == (3, None)
    (gradient,) = torch.autograd.grad(found["z"][0].sum(), model.linear.bias)
    assert torch.equal(gradient, torch.full((4,), 8.0))
    with pytest.raises(ValueError, match=r"input\[1\] is 3.0, captured was 2.0"):
        graphed(args[0], 3.0)
    with pytest.raises(ValueError, match=r"input\[0\]\['b'\] has shape \[3, 4\], captured was \[2, 4\]"):
        graphed({**args[0], "b": torch.randn(3, 4)}, 2.0)
    with pytest.raises(TypeError, match="arranged"):
        graphed(args[0])
    with pytest.raises(TypeError, match=r"input\[0\]\['b'\] is a int, captured was a tensor"):
        graphed({**args[0], "b": 1}, 2.0)


def test_casts_of_weights_are_made_in_each_replay(cuda):
    """Autocast's cache would keep the cast of the capture, and replays would not see what the optimiser wrote."""
    model, x = patched(Net(), "separate"), images()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)  # fills the cache
        graphed = fusedres.graphed(model, x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    eager = copy.deepcopy(model)
    for step in (graphed, eager):
        with torch.autocast("cpu", torch.bfloat16):
            y = step(x)
        y.float().square().sum().backward()
    assert_equal_states(model, eager)
    with pytest.raises(fusedres.CaptureError, match=r"autocast is off, captured was torch.bfloat16"):
        graphed(x)


def test_data_parallel_training_of_what_was_captured(cuda, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = patched(Net().requires_grad_(), "separate")
        eager = copy.deepcopy(model)
        parallel = DistributedDataParallel(fusedres.graphed(model, images()), find_unused_parameters=True)
        for x in (images(), images()):
            parallel(x).square().sum().backward()
            eager(x).square().sum().backward()
        eager.unused.grad = model.unused.grad  # DDP fills it with zeros
        assert_equal_states(model, eager)
        with pytest.raises(fusedres.UnsupportedModelError, match="DistributedDataParallel: capture first"):
            fusedres.graphed(parallel, images())
    finally:
        torch.distributed.destroy_process_group()


def hooked(model):
    model.first.bn1.register_forward_hook(lambda *args: None)


def grad_hooked(model):
    model.head.weight.register_hook(lambda g: g * 2)


def cumulative(model):
    model.second.bn2.momentum = None


def trained_buffer(model):
    model.register_buffer("scale", torch.ones(1, requires_grad=True))


def replaces_buffer(model):
    model.register_buffer("calls", torch.zeros(()))
    original = model.dropout.forward
    model.dropout.forward = lambda x: (setattr(model, "calls", model.calls + 1), original(x))[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hooked, "hook is registered on first.bn1"),
        (grad_hooked, "hook is registered on head.weight"),
        (cumulative, "second.bn2 has momentum=None"),
        (trained_buffer, "buffer scale requires a gradient"),
        (replaces_buffer, "in the place of buffer calls"),
    ],
    ids=lambda f: getattr(f, "__name__", None),
)
def test_models_that_no_graph_can_hold(cuda, change, message):
    model = Net()
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fusedres.UnsupportedModelError, match=message):
        fusedres.graphed(model, images())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_global_hook(cuda):
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(fusedres.UnsupportedModelError, match="on all modules"):
            fusedres.graphed(Net(), images())
    finally:
        handle.remove()


def test_what_does_not_hinder_in_evaluation(cuda):
    """A cumulative average that does not move, and hooks on gradients that are not made."""
    model = Net().eval()
    cumulative(model)
    grad_hooked(model)
    x = images()
    assert torch.equal(fusedres.graphed(model, x)(x), model(x))


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Opaque(nn.Module):
    def forward(self, x):
        return type("Output", (), {"y": x})()


def test_a_forward_that_looks_at_values(cuda):
    with pytest.raises(fusedres.CaptureError, match=r"forward cannot be captured.*\.item\(\)") as raised:
        fusedres.graphed(Branches(), torch.ones(2))
    assert "not permitted when stream is capturing" in str(raised.value.__cause__)
    assert "more lines" not in str(raised.value)
    with pytest.raises(TypeError, match="returns a Output"):
        fusedres.graphed(Opaque(), torch.ones(2))


def test_a_backward_that_looks_at_values(cuda):
    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * dy.sum().item()

    class Model(nn.Linear):
        def forward(self, x):
            return Looks.apply(super().forward(x))

    with pytest.raises(fusedres.CaptureError, match="backward cannot be captured"):
        fusedres.graphed(Model(2, 2), torch.ones(2, 2))


def test_memory_that_runs_out_in_a_capture_is_said_as_it_is(cuda):
    class Large(nn.Module):
        def forward(self, x):
            if cuda.now:
                raise torch.OutOfMemoryError("planted")
            return x

    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        fusedres.graphed(Large(), torch.ones(2))


def test_no_capture_inside_of_another(cuda):
    graphed = fusedres.graphed(Net(), images())
    cuda.now = True
    with pytest.raises(fusedres.CaptureError, match="being captured, and another capture cannot begin"):
        fusedres.graphed(Net(), images())
    with pytest.raises(fusedres.CaptureError, match="being captured, and it cannot be replayed"):
        graphed(images())


def test_without_a_gpu():
    with pytest.raises(fusedres.UnsupportedModelError, match=r"unused is on cpu, .* needs a GPU"):
        fusedres.graphed(Net(), images())
    with pytest.raises(ValueError, match=r"input\[0\] of the example is on cpu, needed a GPU"):
        fusedres.graphed(nn.ReLU(), images())
    with pytest.raises(ValueError, match="neither the model nor the example has a tensor"):
        fusedres.graphed(nn.ReLU(), ())


def test_one_device_for_everything(cuda):
    model = Net()
    with pytest.raises(ValueError, match=r"input\[0\] of the example is on meta, needed cpu"):
        fusedres.graphed(model, images().to("meta"))
    model.head.to("meta")
    with pytest.raises(
        fusedres.UnsupportedModelError, match=r"head.weight is on meta, and a CUDA graph needs"
    ):
        fusedres.graphed(model, images())


def test_several_gpus(cuda, monkeypatch):
    class On:
        def __init__(self, index):
            self.device = torch.device("cuda", index)

    from fusedres.measuring import capturable

    monkeypatch.setattr(capturable, "GPU", "cuda")
    monkeypatch.setattr(
        capturable, "tensors_of", lambda model: iter([("a.weight", On(0)), ("b.weight", On(1))])
    )
    with pytest.raises(fusedres.UnsupportedModelError, match=r"a.weight is on cuda:0 and b.weight on cuda:1"):
        fusedres.graphed(Net(), images())


def test_what_is_no_plain_module(cuda):
    with pytest.raises(TypeError, match=r"torch.nn.Module"):
        fusedres.graphed(lambda x: x, images())
    lazy = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(fusedres.UnsupportedModelError, match="lazy module"):
        fusedres.graphed(lazy, images())
    graphed = fusedres.graphed(Net(), images())
    with pytest.raises(fusedres.UnsupportedModelError, match="captured already"):
        fusedres.graphed(graphed, images())
    with pytest.raises(fusedres.UnsupportedModelError, match="reduce-overhead"):
        fusedres.graphed(torch.compile(Net()), images())
    with pytest.raises(fusedres.UnsupportedModelError, match="wrapped by DataParallel: it spreads"):
        fusedres.graphed(nn.DataParallel(Net()), images())
    with pytest.raises(fusedres.UnsupportedModelError, match="patch the model before"):
        fusedres.patch(graphed)


def test_every_wrapper_that_patch_knows_has_its_advice():
    from fusedres.patching import api

    assert set(WRAPPERS) == set(api.WRAPPERS)


def evaluation(model):
    model.eval()


def one_evaluation(model):
    model.first.bn1.eval()


def other_weight(model):
    model.head.weight = nn.Parameter(torch.zeros(3, 32))


def moved_weight(model):
    model.head.weight.data = model.head.weight.data.clone()


def other_part(model):
    model.head = nn.Linear(32, 3)


def assigned(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def unfrozen(model):
    model.head.bias.requires_grad_()


def taken_off(model):
    model.unused = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (evaluation, "the model is in evaluation mode, captured was training mode"),
        (one_evaluation, "first.bn1 is in evaluation mode"),
        (other_weight, "head.weight is in other memory"),
        (moved_weight, "head.weight is in other memory"),
        (assigned, "is in other memory"),
        (other_part, "a submodule was added, removed or replaced"),
        (unfrozen, "head.bias.requires_grad is True, captured was False"),
        (taken_off, "unused is in other memory"),
        (hooked, "a hook was registered inside"),
    ],
    ids=lambda f: getattr(f, "__name__", None),
)
def test_a_model_changed_since(cuda, change, message):
    model = Net()
    graphed, x = fusedres.graphed(model, images()), images()
    graphed(x)
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fusedres.CaptureError, match=message):
        graphed(x)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "nothing was replayed"


def test_modes_go_to_the_model_and_back(cuda):
    model, x = Net(), images()
    graphed = fusedres.graphed(model, x)
    graphed.eval()
    assert not model.training
    assert not model(x[:1]).isnan().any(), "the model itself serves any mode and size"
    graphed.train()
    graphed(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (images(3), r"input\[0\] has shape \[3, 32, 5, 5\], captured was \[2, 32, 5, 5\]"),
        (images().double(), "has dtype torch.float64, captured was torch.float32"),
        (images().contiguous(), "has strides"),
        (images().to("meta"), "has device meta, captured was cpu"),
    ],
    ids=["shape", "dtype", "strides", "device"],
)
def test_another_input(cuda, x, message):
    graphed = fusedres.graphed(Net(), images())
    with pytest.raises(ValueError, match=message):
        graphed(x)


def test_strides_that_say_nothing_do_not_count(cuda):
    """Those of dimensions of one element, as a batch of one has."""
    model, one = Net().eval(), torch.randn(1, 32, 5, 5)
    graphed = fusedres.graphed(model, one)
    other = one.as_strided(one.shape, (7, *one.stride()[1:]))
    assert torch.equal(graphed(other), model(other))


def test_an_input_that_wants_a_gradient(cuda):
    graphed = fusedres.graphed(Net(), images())
    x = images().requires_grad_()
    with pytest.raises(fusedres.CaptureError, match=r"input\[0\] requires a gradient"):
        graphed(x)
    with torch.no_grad():
        graphed(x)


def test_it_is_no_thing_to_copy_or_save(cuda, tmp_path):
    graphed = fusedres.graphed(Net(), images())
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(graphed)
    with pytest.raises(TypeError, match="cannot be saved"):
        torch.save(graphed, tmp_path / "graphed.pt")
    assert set(graphed.state_dict()) == {f"module.{name}" for name in graphed.module.state_dict()}
    assert "backward: True" in repr(graphed)
