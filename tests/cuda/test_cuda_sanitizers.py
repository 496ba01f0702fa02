"""The host build of the CUDA kernels under sanitizers, and planted bugs, each caught by its own test.

Every run has a reduction and a product under both sanitizers, and a few of the bugs. `make sanitize` has every op,
`make mutants` the other bugs.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cuda_host_build
import cuda_resources
import pytest
from cuda_host_cases import OPS
from cuda_host_list_checks import LIST_CHECKS
from cuda_host_run import EVERY_ORDER, SOME_SHAPES
from cuda_planted_bugs import BUGS, HUGE, PlantedBug

pytestmark = pytest.mark.skipif(cuda_host_build.cuda_include() is None, reason="no CUDA headers here")

EVERY_OP = (*OPS, *LIST_CHECKS)
# blocks that merge what others left in memory, by counters; a ring in shared memory, which copies fill as it is read
SOME_OPS = ("bn_stats", "conv1x1_forward")
SANITIZERS = ("address", "thread")
FEW = (
    "missing_barrier",
    "refilled_ring",
    "wait_too_weak",
    "statistics_over_padded_rows",
    "missing_fence_of_partial_moments",
    "padding_not_zero",
    "tap_shifted_wrongly",
)
MARKED = [pytest.param(name, marks=[] if name in FEW else pytest.mark.mutant) for name in BUGS]
RUN = Path(__file__).parents[1] / "support" / "cuda_host_run.py"


def run(module: Path, variant: str, *ops: str, timeout: int = 900) -> tuple[int, str]:
    command = [sys.executable, "-W", "ignore", str(RUN), str(module), variant, *ops]
    environment = cuda_host_build.environment(variant)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    return done.returncode, f"{done.stdout}\n{done.stderr}\nexit {done.returncode}"


def run_with_bug(name: str, bug: PlantedBug) -> tuple[int, str]:
    folder = cuda_host_build.BUILDS / "bugs" / name
    source = cuda_host_build.ROOT / "csrc"
    for file in (source / "ops.h", *(source / "cuda").iterdir(), *(source / "host_emulator").iterdir()):
        text, copy = file.read_text(), folder / file.relative_to(source.parent)
        if file.name == bug.file:
            assert text.count(bug.found) == 1, f"{bug.file}: the place for {name} is not there exactly once"
            text = text.replace(bug.found, bug.planted)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.read_text() != text:  # else there is nothing to compile again
            copy.write_text(text)
    others = cuda_host_build.objects("plain")
    if bug.variant in SANITIZERS:
        others |= cuda_host_build.objects(cuda_host_build.some(bug.variant))
    module = cuda_host_build.build(bug.variant, folder / "csrc", f"bugs/{name}", {bug.op}, others)
    return run(module, bug.variant, bug.op)


@pytest.fixture(scope="module")
def some_ops():
    """(exit status, output) of each sanitizer on some shapes of some ops."""
    modules = [cuda_host_build.build_some(variant, SOME_OPS) for variant in SANITIZERS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = pool.map(
            lambda module, variant: run(module, variant, SOME_SHAPES, *SOME_OPS), modules, SANITIZERS
        )
        return dict(zip(SANITIZERS, runs, strict=True))


@pytest.fixture(scope="module")
def every_op():
    """(exit status, output) of each variant on every op, in three orders of threads and blocks."""
    modules = [cuda_host_build.build(variant) for variant in cuda_host_build.FLAGS]
    in_orders = partial(run, timeout=3 * 3600)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = pool.map(lambda m, v: in_orders(m, v, EVERY_ORDER, *EVERY_OP), modules, cuda_host_build.FLAGS)
        return dict(zip(cuda_host_build.FLAGS, runs, strict=True))


@pytest.fixture(scope="module")
def planted(request):
    """(exit status, output) with each of the bugs that are to be tried now."""
    here = [
        item for item in request.session.items if item.path == request.path and "name" in item.fixturenames
    ]
    names = [item.callspec.params["name"] for item in here]
    cuda_host_build.build("plain")
    for variant in {BUGS[name].variant for name in names}.intersection(SANITIZERS):
        cuda_host_build.build_some(variant, SOME_OPS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(run_with_bug, names, map(BUGS.get, names)), strict=True))


@pytest.mark.parametrize("variant", SANITIZERS)
def test_some_kernels_are_clean(some_ops, variant):
    status, output = some_ops[variant]
    assert status == 0 and "passed" in output, output[-6000:]


@pytest.mark.sanitizer
@pytest.mark.parametrize("variant", cuda_host_build.FLAGS)
def test_every_kernel_is_clean(every_op, variant):
    status, output = every_op[variant]
    assert status == 0 and "passed" in output and HUGE in output, output[-6000:]
    table = cuda_resources.read_table()[1]
    of_one_architecture = sum(kernel.arch == cuda_resources.ARCHITECTURES[0] for kernel in table)
    assert int(re.search(r"passed: (\d+) kernels", output).group(1)) == of_one_architecture


def test_more_than_2_31_elements():
    """Of the plain build, which `test_cuda_host.py` runs in full but for this."""
    status, output = run(cuda_host_build.build("plain"), "plain", "relu_backward")
    assert status == 0 and "passed" in output and HUGE in output, output[-6000:]


@pytest.mark.parametrize("name", MARKED)
def test_planted_bug_is_caught(planted, name):
    status, output = planted[name]
    assert status != 0 and BUGS[name].caught_by in output, output[-3000:]
