"""torch.compile on a patched model: what is in the graph, that it computes what eager does, when it is made anew."""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, assert_same_float64
from block_forms import FORMS, one_step, patched, projection, randomize, tensors_for
from spellings import InPlaceAdd
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import fusedres
from fusedres.blocks import choice
from fusedres.models import BasicBlock, Bottleneck, CifarResNet, ResNet, cifar_resnet
from fusedres.nn import ConvBN, residual_block

pytestmark = pytest.mark.no_cover  # of the compiler too, which takes most of the time

BLOCK = "fusedres.residual_block_forward.default"


class Graphs:
    """A backend of torch.compile that keeps the names of the operators in each graph it is given."""

    def __init__(self):
        self.operators = []

    def __call__(self, graph, inputs):
        self.operators.append([str(node.target) for node in graph.graph.nodes])
        return aot_eager(graph, inputs)

    def count(self, operator):
        """How often it is in each graph."""
        return [
            names.count(operator) + names.count(operator.removesuffix(".default")) for names in self.operators
        ]


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compiled(model, graphs):
    return torch.compile(model, fullgraph=True, backend=graphs)


def form(name):
    return next(form for form in FORMS if form.name == name)


def assert_same_step(actual, expected):
    """Bit by bit, strides included."""
    assert torch.equal(actual.y, expected.y) and actual.y.stride() == expected.y.stride()
    assert torch.equal(actual.dx, expected.dx) and actual.dx.stride() == expected.dx.stride()
    for name, grad in expected.gradients.items():
        assert torch.equal(actual.gradients[name], grad), name
        assert actual.gradients[name].stride() == grad.stride(), name
    for name, buffer in expected.buffers.items():
        assert torch.equal(actual.buffers[name], buffer), name


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("separate", "basic-projection"),
        ("gram", "bottleneck-projection-conv-bias"),
        ("gram", "bottleneck-mixed-modes"),
    ],
)
def test_a_block_is_one_operator_and_bitwise_what_eager_runs(recipe, name, graphs):
    block, dtype = form(name).build(), torch.float32
    x, dy = tensors_for(form(name), block, dtype)
    eager, traced = (patched(copy.deepcopy(block), recipe) for _ in range(2))
    expected = one_step(eager, x, dy)
    call = compiled(traced, graphs)
    y = call(x := x.clone(memory_format=torch.preserve_format).requires_grad_())
    y.backward(dy)
    assert graphs.count(BLOCK) == [1]
    assert not any("convolution" in name for names in graphs.operators for name in names)
    gradients = {name: p.grad for name, p in traced.named_parameters()}
    assert_same_step(type(expected)(y.detach(), x.grad, gradients, dict(traced.named_buffers())), expected)


def test_a_shortcut_of_any_kind_stays_in_the_graph_beside_the_block(graphs):
    pooled = nn.Sequential(nn.AvgPool2d(2), *projection(16, 32))
    block = randomize(BasicBlock(16, 32, 2, pooled)).double()
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    eager, traced = (patched(copy.deepcopy(block), "separate") for _ in range(2))
    for model in (eager, compiled(traced, graphs)):
        model(x).square().sum().backward()
    assert graphs.count(BLOCK) == [1]
    for (name, p), q in zip(eager.named_parameters(), traced.named_parameters(), strict=True):
        assert torch.equal(p.grad, q[1].grad), name


@pytest.mark.parametrize("frozen", ["conv1", "all"])
def test_gradients_that_nobody_wants_are_not_made(frozen, graphs):
    block = patched(randomize(BasicBlock(16, 16)), "separate")
    for name, p in block.named_parameters():
        p.requires_grad_(frozen != "all" and not name.startswith(frozen))
    x = torch.randn(2, 16, 6, 6, requires_grad=True)
    compiled(block, graphs)(x).sum().backward()
    assert x.grad is not None
    for name, p in block.named_parameters():
        assert (p.grad is None) == (not p.requires_grad), name


def train(model, call, batches, **autocast):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", **autocast or {"enabled": False}):
            y = call(x)
        y.float().square().mean().backward()
        optimizer.step()


# a model, a recipe, steps, and how many blocks it has, its stem included
MODELS = {
    "cifar_bottleneck": (lambda: CifarResNet(Bottleneck, 11, 4), "gram", 5, 4),
    "imagenet_basic": (lambda: ResNet(BasicBlock, (1, 1, 1, 1), 4), "separate", 3, 5),
}


@pytest.mark.parametrize("name", MODELS)
def test_steps_of_training_make_one_graph(name, graphs):
    """Parameters, momenta, running statistics and num_batches_tracked change in every step."""
    build, recipe, steps, blocks = MODELS[name]
    torch.manual_seed(0)
    plain = build().to(memory_format=torch.channels_last)
    eager, traced = (fusedres.patch(copy.deepcopy(plain), recipe=recipe) for _ in range(2))
    batches = [x.to(memory_format=torch.channels_last) for x in torch.randn(steps, 4, 3, 8, 8)]
    call = compiled(traced, graphs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(traced, call, batches)
    assert graphs.count(BLOCK) == [blocks]
    train(eager, eager, batches)
    for (key, value), expected in zip(traced.state_dict().items(), eager.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key
    for model in (eager, traced):
        model.eval()
    with torch.no_grad():
        assert torch.equal(call(batches[0]), eager(batches[0]))
    assert graphs.count(BLOCK) == [blocks, blocks]


def test_evaluation_then_training_before_one_backward(graphs):
    """Backward keeps no running statistics, which the second call moves."""
    torch.manual_seed(0)
    blocks = (randomize(Bottleneck(32, 8), seed=seed) for seed in (0, 1))
    eager = fusedres.patch(nn.Sequential(*blocks).double(), recipe="gram")
    traced = copy.deepcopy(eager)
    x = torch.randn(4, 32, 6, 6, dtype=torch.float64)
    for mode in (False, True):
        eager.train(mode)(x).square().sum().backward()
    call = compiled(traced, graphs)
    losses = []
    for mode in (False, True):
        traced.train(mode)
        losses.append(call(x).square().sum())
    sum(losses).backward()
    assert graphs.count(BLOCK) == [2, 2]
    for (name, p), q in zip(eager.named_parameters(), traced.parameters(), strict=True):
        assert_same_float64(q.grad, p.grad, name)


def test_a_compiled_patched_model_is_the_unpatched_one(graphs):
    torch.manual_seed(0)
    plain = cifar_resnet(8, 4).double()
    traced = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for call in (plain, compiled(traced, graphs)):
        call(x).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), traced.parameters(), strict=True):
        assert_same_float64(q.grad, p.grad, name)
    for (name, p), q in zip(plain.named_buffers(), traced.buffers(), strict=True):
        assert_same_float64(q.double(), p.double(), name)


def test_autocast_decides_the_dtype_in_the_graph(graphs):
    torch.manual_seed(0)
    block = patched(randomize(BasicBlock(16, 16)), "separate")
    stem = nn.Conv2d(3, 16, 3, padding=1)
    eager = nn.Sequential(stem, block)
    traced = copy.deepcopy(eager)
    x = torch.randn(1, 2, 3, 8, 8)
    call = compiled(traced, graphs)
    train(traced, call, x, dtype=torch.bfloat16)
    train(eager, eager, x, dtype=torch.bfloat16)
    assert graphs.count(BLOCK) == [1]
    for (key, value), expected in zip(traced.state_dict().items(), eager.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key
    train(traced, call, x)
    assert graphs.count(BLOCK) == [1, 1]


def test_inductor_runs_a_block():
    torch._dynamo.reset()
    block = randomize(BasicBlock(16, 16))
    x, dy = tensors_for(form("basic"), block, torch.float32)
    exact = one_step(copy.deepcopy(block).double(), x.double(), dy.double())
    eager = one_step(copy.deepcopy(block), x, dy)
    traced = patched(block, "separate")
    y = torch.compile(traced, fullgraph=True)(x := x.clone().requires_grad_())
    y.backward(dy)
    assert_as_accurate_as_eager(y.detach(), eager.y, exact.y, "y")
    assert_as_accurate_as_eager(x.grad, eager.dx, exact.dx, "dx")
    for name, p in traced.named_parameters():
        assert_as_accurate_as_eager(p.grad, eager.gradients[name], exact.gradients[name], name)
    for name, b in traced.named_buffers():
        if b.is_floating_point():
            assert_as_accurate_as_eager(b, eager.buffers[name], exact.buffers[name], name)


class TestWhatIsTracedAnew:
    """A graph holds what the call was checked for; a change gives another graph, fused or of the original."""

    @pytest.fixture
    def block(self):
        return patched(randomize(InPlaceAdd()), "separate")

    @pytest.fixture
    def x(self):
        return torch.randn(2, 16, 6, 6)

    def test_modes_parameters_and_batch_sizes(self, block, x, graphs):
        call = compiled(block, graphs)
        for change in (block.train, block.bn1.eval, block.eval):
            change()
            assert torch.equal(call(x), copy.deepcopy(block)(x))
        block.conv1.weight = nn.Parameter(block.conv1.weight.detach() * 2)
        assert torch.equal(call(x), block(x))
        assert torch.equal(call(x[:1]), block(x[:1]))
        larger = torch.randn(5, 16, 6, 6)
        assert torch.equal(call(larger), block(larger))
        assert set(graphs.count(BLOCK)) == {1}

    def test_disabled(self, block, x, graphs):
        call = compiled(block, graphs)
        call(x)
        with fusedres.disabled():
            call(x)
        call(x)
        assert graphs.count(BLOCK) == [1, 0]

    def test_backend(self, block, x, graphs):
        call = compiled(block, graphs)
        with torch.no_grad():
            call(x)
            with fusedres.use_backend("reference"):
                call(x)
            call(x)
        assert graphs.count(BLOCK) == [1, 1]

    def test_replaced_submodule(self, block, x, graphs):
        call = compiled(block, graphs)
        call(x)
        block.bn1 = nn.Identity()
        assert torch.equal(call(x), block(x))
        assert graphs.count(BLOCK) == [1, 0]

    def test_hook_registered_before(self, block, x, graphs):
        block.bn1.register_forward_hook(lambda module, args, y: y * 2)
        assert torch.equal(compiled(block, graphs)(x), block(x))
        assert graphs.count(BLOCK) == [0]

    def test_geometry(self, block, x, graphs):
        call = compiled(block, graphs)
        call(x)
        block.conv2.padding = block.conv2.dilation = (2, 2)
        assert torch.equal(call(x), block(x))
        assert graphs.count(BLOCK) == [1, 1]


class TestRecipeAuto:
    """Inside a graph `auto` fuses only where a table says that this beats what the compiler makes."""

    def test_traces_the_original_where_nothing_is_known(self, graphs, monkeypatch):
        everywhere = {
            ("cpu", b, torch.float32, g): (choice.Measured("separate", 0, 0, ""),)
            for b in BACKENDS
            for g in (True, False)
        }
        monkeypatch.setattr(choice, "TABLE", everywhere)
        monkeypatch.setattr(choice, "COMPILED", {})
        compiled(patched(BasicBlock(16, 16), "auto"), graphs)(torch.randn(2, 16, 6, 6))
        assert graphs.count(BLOCK) == [0]

    def test_fuses_what_the_table_of_compiled_graphs_names(self, graphs, monkeypatch):
        backend = fusedres.ops.dispatch.dispatcher().backend_on(
            torch.empty(2, 8, 2, 2).to(memory_format=torch.channels_last)
        )
        entry = {("cpu", backend, torch.float32, True): (choice.Measured("separate", 0, 0, ""),)}
        monkeypatch.setattr(choice, "TABLE", {})
        monkeypatch.setattr(choice, "COMPILED", entry)
        call = compiled(patched(BasicBlock(16, 16), "auto"), graphs)
        x = torch.randn(2, 16, 6, 6).to(memory_format=torch.channels_last)
        call(x)
        with torch.no_grad():
            call(x)
        assert graphs.count(BLOCK) == [1, 0]


BACKENDS = fusedres.ops.dispatch.backend_names()


def test_export_keeps_the_original_operations():
    block = patched(BasicBlock(16, 16).eval(), "separate")
    program = torch.export.export(block, (torch.randn(2, 16, 6, 6),))
    assert not any("fusedres" in str(node.target) for node in program.graph.nodes)


def test_the_report_speaks_of_eager_calls_only(graphs):
    block = patched(BasicBlock(16, 16), "separate")
    compiled(block, graphs)(torch.randn(2, 16, 6, 6))
    (row,) = fusedres.report(block).matched
    assert row.runs_as is None and "no eager call yet" in str(fusedres.report(block))


def test_the_functional_block_compiles(graphs):
    conv, bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
    x = torch.randn(2, 8, 5, 5)

    def call(x):
        return residual_block(x, [ConvBN(conv, bn, True)], identity=True)

    expected = call(x)
    bn.reset_running_stats()
    assert torch.equal(compiled(call, graphs)(x), expected)
    assert graphs.count(BLOCK) == [1] and bn.num_batches_tracked == 1
