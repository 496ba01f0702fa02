"""Host time, launches and compiles of whole training steps on the stand-in GPU, beside eager.

The networks are as deep as the real ones and a few channels wide: as many operations, next to no arithmetic. Only this
thread's time counts, so that autograd is made to run backward in it.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import fusedres
from fusedres.measuring.timing import bootstrap_interval, median
from fusedres.models import resnet
from fusedres.ops.backend import Backend
from fusedres.ops.contract import RawOp, op_name
from fusedres.ops.dispatch import Dispatcher
from fusedres.recording import replays
from gpu_stand_in import StandIn

WIDTHS = 8, 16, 32, 64  # of the stages
SHAPE = 8, 3, 16, 16  # 1 x 1 in the last two stages
WARM_STEPS = 4
EAGER = "eager"
NO_RAW_OPS = "bn_running_stats_", "cast_"  # of our own operators


class Case(NamedTuple):
    """How a network is run: eager, or patched with a recipe and a backend."""

    recipe: str
    backend: str = "auto"

    @property
    def name(self) -> str:
        return self.recipe if self.backend == "auto" else f"{self.recipe}, {self.backend}"


CASES = {
    "resnet18": (Case(EAGER), Case("separate"), Case("prologue", "native")),
    "resnet50": (Case(EAGER), Case("separate"), Case("gram"), Case("gram", "native")),
}


class Counts(NamedTuple):
    """Of one step. operators: torch's own that are not views, each of which launches a kernel or more on a GPU."""

    raw_ops: dict[str, int]
    triton_launches: dict[str, int]
    operators: dict[str, int]


class Step:
    """A training step of one network: forward under autocast to bfloat16, and backward."""

    def __init__(self, network: nn.Module, case: Case) -> None:
        self.model = copy.deepcopy(network)
        if case.recipe != EAGER:
            fusedres.patch(self.model, recipe=case.recipe, backend=case.backend)
        self.images = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
        self.labels = torch.arange(SHAPE[0])

    def forward(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(self.images)
        return F.cross_entropy(logits.float(), self.labels)

    def __call__(self) -> tuple[float, float]:
        """Seconds of this thread: of the forward and of the backward."""
        for p in self.model.parameters():
            p.grad = None
        start = time.thread_time()
        loss = self.forward()
        middle = time.thread_time()
        with torch.autograd.set_multithreading_enabled(False):
            loss.backward()
        return middle - start, time.thread_time() - middle


class Operators(TorchDispatchMode):
    """Counts torch's operators by name, without views and without those that make an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        schema = func._schema
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        namespace, _, name = schema.name.partition("::")
        is_ours = namespace.startswith("fusedres")
        if not is_view and "empty" not in name and (not is_ours or name in NO_RAW_OPS):
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_raw_ops() -> Iterator[dict[str, int]]:
    """Calls of each raw op, by a dispatcher or by the backend that it named."""
    counts: dict[str, int] = {}

    def counted(call: Callable[[Any, RawOp], object]) -> Callable[[Any, RawOp], object]:
        def run(self: Any, op: RawOp) -> object:
            counts[op_name(type(op))] = counts.get(op_name(type(op)), 0) + 1
            return call(self, op)

        return run

    with (
        mock.patch.object(Dispatcher, "__call__", counted(Dispatcher.__call__)),
        mock.patch.object(Backend, "__call__", counted(Backend.__call__)),
    ):
        yield counts


@contextmanager
def counted_launches() -> Iterator[dict[str, int]]:
    """Launches of each Triton kernel, of which none is compiled."""
    counts: dict[str, int] = {}

    def run(kernel: JITFunction, *args: Any, **options: Any) -> None:
        counts[kernel.__name__] = counts.get(kernel.__name__, 0) + 1

    with mock.patch.object(JITFunction, "run", run):
        yield counts


@contextmanager
def products_without_values() -> Iterator[None]:
    """torch's convolutions and matrix products allocate what they return, and do nothing else: as the native ones do on
    the stand-in.

    What is left of a step is what it costs the host, and native convolutions can be compared with torch's.
    """

    def forward(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):  # type: ignore[no-untyped-def]
        sizes = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        ]
        shape = (x.shape[0], weight.shape[0], *sizes)
        return torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)

    def backward(dy, x, weight, bias_sizes, *args):  # type: ignore[no-untyped-def]
        wants_x, wants_weight, wants_bias = args[-1]
        return (
            torch.empty_like(x) if wants_x else None,
            torch.empty_like(weight) if wants_weight else None,
            dy.new_empty(bias_sizes) if wants_bias else None,
        )

    def multiply(left, right):  # type: ignore[no-untyped-def]
        return left.new_empty((left.shape[0], right.shape[1]))

    def multiply_add(bias, left, right, *, beta=1, alpha=1):  # type: ignore[no-untyped-def]
        return multiply(left, right)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced is what this is for
        library.impl("convolution", forward, "CPU")
        library.impl("convolution_backward", backward, "CPU")
        library.impl("mm", multiply, "CPU")
        library.impl("addmm", multiply_add, "CPU")
    replays.forget()  # what was recorded goes past these
    try:
        yield
    finally:
        library._destroy()
        replays.forget()


def count(step: Step) -> Counts:
    """Of one step, without compiling or launching anything."""
    with counted_raw_ops() as raw_ops, counted_launches() as launches, Operators() as operators:
        step()
    return Counts(raw_ops, launches, operators.counts)


def count_all() -> dict[str, dict[str, Counts]]:
    """By network and case."""
    found = {}
    for name, cases in CASES.items():
        plain = network(name)
        found[name] = {case.name: count(Step(plain, case)) for case in cases}
    return found


def network(name: str) -> nn.Module:
    """The reference network of that name with narrow stages."""
    torch.manual_seed(0)
    widths, resnet.STAGE_WIDTHS = resnet.STAGE_WIDTHS, WIDTHS
    try:
        return getattr(resnet, name)().to(memory_format=torch.channels_last).train()
    finally:
        resnet.STAGE_WIDTHS = widths


class Row(NamedTuple):
    """Of one way to run a network: seconds of the forward and of the backward, and the steps' ratios to eager's."""

    seconds: list[tuple[float, float]]
    ratios: list[float]
    cubins: int


def paired(eager: Step, step: Step, rounds: int) -> tuple[list[tuple[float, float]], list[float]]:
    """Seconds of the step, and its ratio to eager's beside it. No third model runs between them: whoever trains one
    has the caches of a processor for it alone, and host time is what these miss."""
    seconds, ratios = [], []
    for _ in range(rounds):
        before, own = eager(), step()
        seconds.append(own)
        ratios.append(sum(own) / sum(before))
    return seconds, ratios


def measured(stand_in: StandIn, plain: nn.Module, cases: tuple[Case, ...], rounds: int) -> dict[Case, Row]:
    """cases: eager first."""
    eager, found = Step(plain, cases[0]), {}
    for case in track(cases, "host time"):
        before = stand_in.cubins
        step = Step(plain, case)
        for _ in range(WARM_STEPS):
            eager()
            step()
        cubins = stand_in.cubins - before
        found[case] = Row(*paired(eager, step, rounds), cubins)
    return found


def measure(stand_in: StandIn, rounds: int, title: str) -> None:
    """Prints a table of every network and way to run it."""
    table = Table(title=title)
    for column in ("network", "runs as", "forward ms", "backward ms", "of eager's", "cubins"):
        table.add_column(column)
    for columns in ("raw ops", "Triton launches", "operators"):
        table.add_column(columns, justify="right")
    for name, cases in CASES.items():
        plain = network(name)
        for case, row in measured(stand_in, plain, cases, rounds).items():
            forward, backward = (median([s[i] for s in row.seconds]) * 1e3 for i in (0, 1))
            low, high = bootstrap_interval(row.ratios)
            counts = count(Step(plain, case))
            table.add_row(
                *(name, case.name, f"{forward:.2f}", f"{backward:.2f}"),
                f"{median(row.ratios):.2f} [{low:.2f} {high:.2f}]",
                *map(str, (row.cubins, sum(counts.raw_ops.values()), sum(counts.triton_launches.values()))),
                str(sum(counts.operators.values())),
            )
    Console(width=140).print(table)


def main(stand_in: StandIn, rounds: int) -> None:
    """Prints the table as it is, and without the arithmetic of convolutions and of the last layer."""
    torch.set_num_threads(1)
    measure(stand_in, rounds, "A training step's host time on the stand-in GPU, bfloat16 autocast")
    with products_without_values():
        measure(stand_in, rounds, "The same, where no product computes anything")
