"""graphed on a GPU: whole steps in CUDA graphs, bit by bit what the same steps are without them.

Without one `tests/measuring/test_graphed.py` has a stand-in.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

import fusedres
from fusedres.ops.dispatch import LOADERS

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

BATCH = 8
CASES = [(None, "auto"), *((recipe, backend) for recipe in ("separate", "gram") for backend in LOADERS)]


@pytest.fixture(autouse=True)
def repeatable_library(monkeypatch):
    """cuDNN's weight gradients may add in any order otherwise, and its choice of algorithms may change."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


class WithDropout(torch.nn.Module):
    def __init__(self, recipe, backend):
        super().__init__()
        self.body = fusedres.models.create("resnet50", num_classes=64)
        self.dropout = torch.nn.Dropout(0.5)
        self.to("cuda", memory_format=torch.channels_last)
        if recipe is not None:
            fusedres.patch(self.body, recipe=recipe, backend=backend)

    def forward(self, x):
        return self.dropout(self.body(x))


def images(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 3, 64, 64, generator=generator)
    return x.to("cuda", memory_format=torch.channels_last)


def train(model, step, steps=4):
    """Steps of two batches each under autocast; returns the outputs."""
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    labels, outputs = torch.arange(BATCH, device="cuda"), []
    for i in range(2 * steps):
        with torch.autocast("cuda", torch.bfloat16):
            outputs.append(step(images(i)))
        F.cross_entropy(outputs[-1].float(), labels).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    return outputs


@pytest.mark.parametrize(("recipe", "backend"), CASES)
def test_training(recipe, backend):
    torch.manual_seed(0)
    model = WithDropout(recipe, backend)
    eager = copy.deepcopy(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    generators = torch.get_rng_state(), torch.cuda.get_rng_state()
    with torch.autocast("cuda", torch.bfloat16):
        graphed = fusedres.graphed(model, images(9))
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(generators[0], torch.get_rng_state())
    assert torch.equal(generators[1], torch.cuda.get_rng_state())
    found, expected = train(model, graphed), train(eager, eager)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"output {i}"
    for (name, t), u in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        assert torch.equal(t, u), name
    assert model.body.bn1.num_batches_tracked == len(found)
    if recipe is not None:
        assert "unfused" not in {row.runs_as for row in fusedres.report(model).matched}


@pytest.mark.parametrize(("recipe", "backend"), CASES)
def test_inference(recipe, backend):
    torch.manual_seed(0)
    model = WithDropout(recipe, backend).eval()
    graphed = fusedres.graphed(model, images(9))
    outputs = [graphed(images(i)) for i in range(3)]
    with torch.no_grad():
        for i, y in enumerate(outputs):
            assert torch.equal(y, model(images(i))), f"output {i}"


def test_a_forward_that_reads_a_value_is_refused_and_the_gpu_stays_usable():
    class Branches(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(fusedres.CaptureError, match="cannot be captured"):
        fusedres.graphed(Branches(), torch.ones(2, device="cuda"))
    stream = torch.cuda.current_stream()
    assert stream == torch.cuda.default_stream() and torch.ones(2, device="cuda").sum().item() == 2


@pytest.mark.parametrize("recipe", ["separate", "gram"])
def test_a_cold_call_in_a_capture_is_left_to_the_original(recipe):
    """And what was captured is right; library handles are warm, Triton's kernels need not be."""
    model = WithDropout(recipe, "auto").eval()
    x = images(1)
    with torch.no_grad(), fusedres.disabled():
        expected = model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = model(x)
    graph.replay()
    assert {row.code.partition(":")[0] for row in fusedres.report(model).matched} == {"not_warm"}
    assert torch.equal(y, expected)
