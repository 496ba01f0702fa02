"""What is measured: blocks and models, a training step or inference, under one implementation or another.

Three endings of a name stand for CUDA graphs: `_graph` is the whole step as one graph, loss and optimiser included;
`_graphed` is `fusedres.graphed`, the model's forward and backward as a graph each; `_compile_graph`, and compilers' own
`_graph`, are torch.compile's graphs (`reduce-overhead`).

`Workload` says what, an implementation's name says how, `build` makes the `Step` that does it once. Weights
and inputs are equal in all implementations of a workload. Half precision is autocast with float32 weights.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager
from layers import STAGE_SIDES, STAGE_WIDTHS
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

import fusedres
from fusedres import models
from fusedres.measuring.graphed import Graphed
from fusedres.models.blocks import BasicBlock, Bottleneck, conv1x1, conv3x3

BASELINE = "eager_channels_last"

# implementation: keyword arguments of torch.compile
COMPILE_OPTIONS: dict[str, dict[str, object]] = {
    "torch_compile": {},
    "torch_compile_graph": {"mode": "reduce-overhead"},
    "torch_compile_max_autotune": {"mode": "max-autotune-no-cudagraphs"},
    "torch_compile_max_autotune_graph": {"mode": "max-autotune"},
}
EAGER = ("eager_nchw", BASELINE, "eager_channels_last_graph")
FUSEDRES = ("fusedres_auto", "fusedres_separate", "fusedres_prologue", "fusedres_gram")
RECIPES = FUSEDRES[1:]  # what runs fused wherever it is asked to
GRAPHED = ("eager_channels_last_graphed", *(f"{name}_graphed" for name in FUSEDRES))
COMPILED_RECIPES = {f"{name}_compile_graph": COMPILE_OPTIONS["torch_compile_graph"] for name in RECIPES}
COMPILED = {**COMPILE_OPTIONS, **COMPILED_RECIPES}
IMPLEMENTATIONS = (*EAGER, *COMPILED, *FUSEDRES, *(f"{name}_graph" for name in FUSEDRES), *GRAPHED)
GRAPH_DEVICE = "cuda"  # the kind that has graphs


def needs_graph(implementation: str) -> bool:
    """Whether it replays a CUDA graph, and so needs a GPU."""
    return implementation.endswith(("_graph", "_graphed"))


def recipe_of(implementation: str) -> str | None:
    """The recipe that a model is patched with, None for an unpatched one."""
    name = implementation.removesuffix("_graphed").removesuffix("_graph").removesuffix("_compile")
    return name.removeprefix("fusedres_") if name in FUSEDRES else None


def make_block(block: type[BasicBlock] | type[Bottleneck], stage: int, projection: bool) -> nn.Module:
    """A block of ResNet's `stage` (1 to 4), in a Sequential: inside it the block can be patched."""
    width = STAGE_WIDTHS[stage - 1]
    cout = width * block.expansion
    if not projection:
        return nn.Sequential(block(cout, width))
    cin, stride = (64, 1) if stage == 1 else (cout // 2, 2)
    downsample = nn.Sequential(conv1x1(cin, cout, stride), nn.BatchNorm2d(cout))
    return nn.Sequential(block(cin, width, stride, downsample))


def block_input(stage: int, cout: int, projection: bool) -> tuple[int, int, int]:
    side = STAGE_SIDES[stage - 1]
    if not projection:
        return cout, side, side
    return (64, side, side) if stage == 1 else (cout // 2, 2 * side, 2 * side)


def resnext50() -> nn.Module:
    """ResNeXt-50 32x4d: ResNet-50 whose 3x3 convolutions have twice the channels, in 32 groups."""
    model = models.create("resnet50")
    for block in [module for module in model.modules() if isinstance(module, Bottleneck)]:
        stride, width = block.conv2.stride[0], 2 * block.conv2.out_channels
        block.conv1, block.bn1 = conv1x1(block.conv1.in_channels, width), nn.BatchNorm2d(width)
        block.conv2, block.bn2 = conv3x3(width, width, stride, groups=32), nn.BatchNorm2d(width)
        block.conv3 = conv1x1(width, block.conv3.out_channels)
    return model


@dataclass(frozen=True)
class Architecture:
    make: Callable[[], nn.Module]
    image: tuple[int, int, int]  # [C, H, W]
    classifies: bool  # a model with logits and an optimiser, or a block


def architectures() -> dict[str, Architecture]:
    found = {
        "resnet18": Architecture(partial(models.create, "resnet18"), (3, 224, 224), True),
        "resnet34": Architecture(partial(models.create, "resnet34"), (3, 224, 224), True),
        "resnet50": Architecture(partial(models.create, "resnet50"), (3, 224, 224), True),
        "resnext50": Architecture(resnext50, (3, 224, 224), True),
        "cifar_resnet20": Architecture(partial(models.create, "cifar_resnet20"), (3, 32, 32), True),
    }
    for kind, block in (("basic", BasicBlock), ("bottleneck", Bottleneck)):
        for projection in (False, True):
            for stage in (1, 2, 3, 4):
                name = f"{kind}_{'projection' if projection else 'identity'}_{stage}"
                shape = block_input(stage, STAGE_WIDTHS[stage - 1] * block.expansion, projection)
                found[name] = Architecture(partial(make_block, block, stage, projection), shape, False)
    return found


ARCHITECTURES = architectures()


@dataclass(frozen=True)
class Workload:
    architecture: str
    phase: str  # "train" or "infer"
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> str:
        return f"{self.architecture}/{self.phase}/{str(self.dtype).removeprefix('torch.')}/{self.batch}"


@dataclass
class Step:
    """One implementation of a workload: `run` does a whole step, `forward` gives its output alone."""

    run: Callable[[], object]
    forward: Callable[[], Tensor]
    model: nn.Module

    def runs_as(self) -> dict[str, int]:
        """How many blocks ran as which recipe in their last call; empty for an unpatched model."""
        if isinstance(self.model, OptimizedModule) or not fusedres.is_patched(self.model):
            return {}
        model = self.model.module if isinstance(self.model, Graphed) else self.model
        blocks = fusedres.report(model).blocks
        return dict(Counter(block.runs_as or block.code or "" for block in blocks))


def autocast(workload: Workload) -> AbstractContextManager[object]:
    if workload.dtype in (torch.float32, torch.float64):
        return nullcontext()
    return torch.autocast(workload.device.type, workload.dtype)


def make_model(workload: Workload, memory_format: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    model = ARCHITECTURES[workload.architecture].make()
    return model.to(workload.device, memory_format=memory_format).train(workload.phase == "train")


def make_input(workload: Workload) -> Tensor:
    """x [N, C, H, W], NCHW, on the CPU's generator: the same on every device. A model is given float32, a block what
    the block before it makes under autocast.
    """
    generator = torch.Generator().manual_seed(1)
    architecture = ARCHITECTURES[workload.architecture]
    dtype = torch.float32 if architecture.classifies else workload.dtype
    return torch.randn((workload.batch, *architecture.image), generator=generator).to(workload.device, dtype)


def implement(model: nn.Module, implementation: str, backend: str) -> nn.Module:
    recipe = recipe_of(implementation)
    if recipe is not None:
        fusedres.patch(model, recipe=recipe, backend=backend)
    if implementation in COMPILED:
        return torch.compile(model, **COMPILED[implementation])  # type: ignore[call-overload]
    return model


def build(workload: Workload, implementation: str, backend: str = "auto") -> Step:
    """The step of a workload under an implementation.

    Raises:
        ValueError: unknown implementation, or one that replays a CUDA graph on another device.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"build: no implementation {implementation!r}, choose from {IMPLEMENTATIONS}")
    if needs_graph(implementation) and workload.device.type != GRAPH_DEVICE:
        raise ValueError(f"build: {implementation} replays a CUDA graph, found device {workload.device}")
    torch.backends.cudnn.benchmark = True
    memory_format = torch.contiguous_format if implementation == "eager_nchw" else torch.channels_last
    model = implement(make_model(workload, memory_format), implementation, backend)
    x = make_input(workload).contiguous(memory_format=memory_format)
    if implementation in GRAPHED:
        if workload.phase == "train" and not ARCHITECTURES[workload.architecture].classifies:
            x.requires_grad_()
        with autocast(workload):
            model = fusedres.graphed(model, x)
    step = training_step(workload, model, x) if workload.phase == "train" else inference(workload, model, x)
    if not needs_graph(implementation) or implementation in GRAPHED:
        return step
    return marked(step) if implementation in COMPILED else captured(step)


def training_step(workload: Workload, model: nn.Module, x: Tensor) -> Step:
    def forward() -> Tensor:
        with autocast(workload):
            return model(x)

    if not ARCHITECTURES[workload.architecture].classifies:
        with torch.no_grad(), autocast(workload):
            like = copy.deepcopy(model.module if isinstance(model, Graphed) else model).train(False)(x)
        dy = torch.randn(like.shape, generator=torch.Generator().manual_seed(2)).to(x)
        x.requires_grad_()

        def block_step() -> None:
            model.zero_grad()
            x.grad = None
            y = forward()
            y.backward(dy.to(y.dtype))

        return Step(block_step, forward, model)

    labels = torch.arange(workload.batch, device=workload.device) % 10
    # all of SGD's work, but the weights stay: every round computes the same, and the gate may come any time
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def model_step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward().float(), labels).backward()
        optimizer.step()

    return Step(model_step, forward, model)


def inference(workload: Workload, model: nn.Module, x: Tensor) -> Step:
    @torch.no_grad()
    def forward() -> Tensor:
        with autocast(workload):
            return model(x)

    return Step(forward, forward, model)


def marked(step: Step) -> Step:
    """A compiled step whose CUDA graphs may be replayed from the start."""

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        step.run()

    def forward() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return step.forward()

    return Step(run, forward, step.model)


def captured(step: Step) -> Step:
    """The step, with its loss and optimiser, as one CUDA graph, captured after three warm-up runs on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    return Step(graph.replay, step.forward, step.model)


def exact_output(workload: Workload) -> Tensor:
    """The output in float64, on unpatched modules."""
    model = make_model(workload, torch.channels_last).double()
    with torch.no_grad():
        return model(make_input(workload).double())


class CorrectnessGate:
    """Holds an implementation's output against float64, judged by the error of eager (`tests/support/accuracy.py`).

    A training step must also leave a finite gradient on every parameter; how accurate it is, the tests say:
    against float64 a gradient is dominated by the few signs near zero that rounding flips.
    """

    def __init__(self) -> None:
        self.references: dict[Workload, tuple[Tensor, Tensor]] = {}

    def check(self, workload: Workload, step: Step, what: str) -> None:
        """Raises AssertionError where the step's output is less accurate than eager's allows."""
        if workload not in self.references:
            eager = build(workload, BASELINE).forward().detach()
            self.references[workload] = (eager, exact_output(workload))
        found = step.forward().detach().clone()
        assert_as_accurate_as_eager(found, *self.references[workload], f"{workload.name} {what}")
        if workload.phase == "train":
            step.run()
            for name, parameter in step.model.named_parameters():
                grad = parameter.grad
                assert grad is not None and grad.isfinite().all(), f"{what}: gradient of {name} is {grad}"
