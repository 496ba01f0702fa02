"""A call is bound to its recording while nothing is another that decides about it, and only then."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from block_changes import CHANGES, block
from bound_calls import WARM, assert_equal, assert_same_step, autocast, forwards, images, step
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusedres
from fusedres.blocks import choice, user_table
from fusedres.blocks.unfused import Measured
from fusedres.models import Bottleneck
from fusedres.modules.derived_class import STATE
from fusedres.ops import set_aside
from fusedres.ops.contract import BnStats
from fusedres.ops.dispatch import ENVIRONMENT_VARIABLE, use_backend
from fusedres.ops.native import from_python, library
from fusedres.patching import bound, fits, watch
from fusedres.recording import replays

pytestmark = pytest.mark.skipif(not library.is_loaded(), reason="the compiled kernels are not built")


@pytest.fixture(autouse=True)
def recordings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(replays, "DEVICES", {"cpu"})
    replays.forget()
    yield
    replays.forget()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call that could be bound, whether it was."""
    found: list[bool] = []
    y = bound.Bound.y

    def noted(self: bound.Bound, *args: object) -> Tensor | None:
        result = y(self, *args)  # type: ignore[arg-type]
        found.append(result is not None)
        return result

    monkeypatch.setattr(bound.Bound, "y", noted)
    return found


def bound_block() -> tuple[Bottleneck, Bottleneck]:
    """Two patched blocks, the first to be run by Python, which other tests hold against the unpatched one; a training
    step of the second is bound."""
    module = block().float().to(memory_format=torch.channels_last)
    by_python, patched = (fusedres.patch(copy.deepcopy(module), recipe="separate") for _ in range(2))
    for _ in range(WARM):
        assert_same_step(by_python, patched)
    assert patched.__dict__[STATE].bound
    return by_python, patched


def test_every_step_is_bound_and_is_the_one_that_python_runs(served: list[bool]) -> None:
    by_python, patched = bound_block()
    assert patched.__dict__[STATE].runs_as == "separate" and served[-1]
    served.clear()
    for seed in range(3):
        assert_same_step(by_python, patched, images(seed=seed))
    assert served == [True] * 3
    assert_same_step(by_python, patched, images(2, 16, 5, 5))
    assert served == [True] * 3


def unusual_forward(module: Bottleneck) -> None:
    conv = module.conv2
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) * 2  # type: ignore[method-assign]


def unsigned(t: Tensor) -> None:
    """The same memory, whose sign torch's dispatcher makes true."""
    t.data = torch._neg_view(t.data)


OF_MODULES: dict[str, Callable[[Bottleneck], object]] = {
    "another module": lambda m: setattr(m, "bn2", nn.BatchNorm2d(4)),
    "a module more": lambda m: m.conv2.add_module("another", nn.Identity()),
    "another class": lambda m: setattr(m.conv2, "__class__", type("Other", (nn.Conv2d,), {})),
    "a forward of its own": unusual_forward,
    "a hook before": lambda m: m.bn3.register_forward_pre_hook(lambda mod, x: (x[0] * 2,)),
    "a backward hook": lambda m: m.conv2.register_full_backward_hook(lambda mod, dx, dy: (dx[0] * 2,)),
    "an attribute that forward reads": lambda m: setattr(m, "residual", False),
    "another mean": lambda m: setattr(m.bn1, "running_mean", torch.ones(4)),
    "a buffer more": lambda m: m.bn1.register_buffer("another", torch.ones(4)),
    "no statistics of one": lambda m: setattr(m.bn1, "num_batches_tracked", None),
    "an attribute more": lambda m: setattr(m.conv1, "note", 3),
    "a sign of a weight": lambda m: unsigned(m.conv2.weight),
    "a sign of a vector": lambda m: unsigned(m.bn3.bias),
}


@pytest.mark.parametrize("name", [*CHANGES, *OF_MODULES])
def test_a_change_between_two_bound_calls_counts(name: str, served: list[bool]) -> None:
    by_python, patched = bound_block()
    served.clear()
    for module in (by_python, patched):
        {**CHANGES, **OF_MODULES}[name](module)
    assert_same_step(by_python, patched)
    assert served == [name in HARMLESS]
    assert patched.__dict__[STATE].reason == by_python.__dict__[STATE].reason
    for _ in range(WARM):
        assert_same_step(by_python, patched)


def test_another_method_of_a_class_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    _, patched = bound_block()
    forward = nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: forward(self, x) * 2)
    step(patched, images())
    assert patched.__dict__[STATE].reason == "forward_replaced:BatchNorm2d.forward"


def test_a_hook_of_all_modules_counts() -> None:
    _, patched = bound_block()
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: None)
    try:
        step(patched, images())
    finally:
        handle.remove()
    assert patched.__dict__[STATE].reason == "hooks:on all modules"


HARMLESS = {"values", "frozen weight"}  # of which the recording knows, or nothing depends


@contextmanager
def variable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(ENVIRONMENT_VARIABLE, "reference")
        yield


@contextmanager
def aside() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patching:
        place = set_aside.Place("native", BnStats, torch.device("cpu"))
        patching.setitem(set_aside._found, place, "for a test")
        yield


CONTEXTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "autocast to another dtype": lambda: torch.autocast("cpu", torch.float16),
    "another backend": lambda: use_backend("reference"),
    "another backend by the environment": variable,
    "replays off": replays.off,
    "an op set aside": aside,
    "unpatched": fusedres.disabled,
    "a dispatch mode": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_call_in_another_context_is_not_the_bound_one(name: str, served: list[bool]) -> None:
    by_python, patched = bound_block()
    served.clear()
    seen = []
    for module in (by_python, patched):
        x = images().requires_grad_()  # as in the steps that were bound
        with autocast(), CONTEXTS[name]():
            try:
                seen.append(module(x))
            except RuntimeError as error:  # of the original: weights and images are of two dtypes
                seen.append(str(error))
    assert not any(served)
    assert type(seen[0]) is type(seen[1])
    if isinstance(seen[0], Tensor):
        assert seen[0].dtype is seen[1].dtype and seen[0].requires_grad == seen[1].requires_grad
        assert torch.equal(*seen)
    else:
        assert seen[0] == seen[1]
    assert_same_step(by_python, patched)
    assert served[-1]


def test_under_torch_func_the_original_runs(served: list[bool]) -> None:
    by_python, patched = (module.eval() for module in bound_block())
    left: list[Tensor] = []

    def loss(x: Tensor, module: nn.Module) -> Tensor:
        left.append(x)
        return module(x).sum()

    with torch.no_grad():
        for _ in range(WARM):
            forwards(by_python, patched, images())
    assert served[-1]
    served.clear()
    with autocast():
        expected, actual = (torch.func.grad(loss)(images(), m) for m in (by_python, patched))
    assert torch.equal(actual, expected)
    assert str(patched.__dict__[STATE].reason).startswith("tracing:torch.func") and not any(served)
    # the wrappers that it leaves have no storage, and stand for a tensor to torch's dispatcher alone
    with torch.no_grad():
        assert torch.equal(*forwards(by_python, patched, left[0]))
    assert not any(served)


def test_what_is_more_than_memory_is_left_to_the_dispatcher(served: list[bool]) -> None:
    """A sign that is still to be made true, and a wrapper without storage."""
    by_python, patched = bound_block()
    served.clear()
    assert torch.equal(*forwards(by_python, patched, torch._neg_view(images()).requires_grad_()))
    assert served == [False]
    outputs = forwards(by_python, patched, images().requires_grad_())
    for y in outputs:
        y.backward(torch._neg_view(images(*y.shape)), retain_graph=True)
    for (name, a), (_, b) in zip(patched.named_parameters(), by_python.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad), name
    assert served[-1]
    for y in outputs:
        with pytest.raises(RuntimeError, match="functional tensor"):
            y.backward(torch._to_functional_tensor(images(*y.shape)))


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("key", ["CPU", "CompositeExplicitAutograd"])
def test_a_convolution_of_somebody_else_runs(key: str, served: list[bool]) -> None:
    """Before its calls are bound, and after."""
    by_python, patched = bound_block()
    calls = []
    implementation = torch.library.Library("aten", "IMPL")

    def convolution(x: Tensor, weight: Tensor, *_: object) -> Tensor:
        calls.append(1)
        size = x.shape[0], weight.shape[0], *x.shape[2:]
        return torch.ones(size, dtype=x.dtype).contiguous(memory_format=torch.channels_last)

    with torch.no_grad():
        implementation.impl("convolution", convolution, key)
        try:
            for _ in range(WARM):
                calls.clear()
                assert torch.equal(*forwards(by_python, patched, images()))
                assert len(calls) == 6
            assert served[-1]
        finally:
            implementation._destroy()
    assert_same_step(by_python, patched)


def test_calls_that_are_bound_anew_again_and_again_are_left(
    served: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bound, "MOST_BINDINGS", 3)
    by_python, patched = bound_block()
    room = torch.zeros(images().numel() + 1, dtype=torch.bfloat16)
    misaligned = room[1:].as_strided(images().shape, images().stride()).copy_(images())
    served.clear()
    for _ in range(3 * WARM):
        for x in (images(), misaligned):
            assert torch.equal(*forwards(by_python, patched, x))
    assert not all(served) and len(served) < 3 * WARM
    served.clear()
    for x in (images(), misaligned):
        assert torch.equal(*forwards(by_python, patched, x))
    assert not served


class Asked(TorchFunctionMode):
    """Raises where a parameter is asked about a gradient, by whoever asks."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        of = getattr(func, "__self__", None)
        if getattr(of, "__name__", "") == "requires_grad" and type(args[0]) is nn.Parameter:
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_is_raised_as_tensors_are_asked_is_raised(
    error: type[BaseException], served: list[bool]
) -> None:
    _, patched = bound_block()
    with autocast():
        for _ in range(WARM):
            patched(images())
        before = patched.bn1.num_batches_tracked.clone()
        assert served[-1]
        with pytest.raises(error), Asked(error):
            patched(images())
    assert torch.equal(patched.bn1.num_batches_tracked, before)


def test_an_interrupt_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while the modules are looked through makes the call a resolved one; an interrupt is not an error."""
    _, patched = bound_block()

    def interrupted(self: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bottleneck, "expansion", property(interrupted))
    with pytest.raises(KeyboardInterrupt):
        step(patched, images())


def test_a_checkpoint_and_hooks_of_saved_tensors_see_all_that_is_kept(served: list[bool]) -> None:
    by_python, patched = bound_block()
    seen: list[int] = []

    def run(module: nn.Module) -> dict[str, Tensor | None]:
        module.zero_grad()
        x, count = images().requires_grad_(), [0]

        def pack(t: Tensor) -> Tensor:
            count[0] += 1
            return t

        with autocast():
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                y = module(x)
            (y + checkpoint(module, x, use_reentrant=False)).sum().backward()
        seen.append(count[0])
        return {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}

    for _ in range(WARM):
        with replays.off():
            expected = run(by_python)
        assert_equal(run(patched), expected)
    assert served[-1] and len({*seen}) == 1


def test_second_derivatives_of_a_bound_call(served: list[bool]) -> None:
    by_python, patched = bound_block()

    def second(module: nn.Module) -> Tensor:
        x = images().requires_grad_()
        with autocast():
            y = module(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    for _ in range(WARM):
        with replays.off():
            expected = second(by_python)
        assert torch.equal(second(patched), expected)
    assert served[-1]


@pytest.mark.parametrize("asked", ["conv1.weight", "bn3.bias", "conv3.weight"])
def test_gradients_that_nobody_asks_for(asked: str, served: list[bool]) -> None:
    by_python, patched = bound_block()
    x = images().requires_grad_()
    for _ in range(WARM):
        outputs = forwards(by_python, patched, x)
        expected, actual = (
            torch.autograd.grad(y.square().sum(), m.get_parameter(asked))[0]
            for y, m in zip(outputs, (by_python, patched), strict=True)
        )
        assert torch.equal(actual, expected)
    assert served[-1]


def test_a_graph_that_is_kept_runs_backward_twice() -> None:
    _, patched = bound_block()
    with autocast():
        y = patched(images().requires_grad_())
    first, second = (
        torch.autograd.grad(y.sum(), patched.conv1.weight, retain_graph=keeps)[0] for keeps in (True, False)
    )
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_auto_is_bound_while_its_tables_are_the_same(
    served: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {("cpu", "native", torch.bfloat16, True): (Measured("separate", 0, 0, "a test"),)}
    monkeypatch.setattr(choice, "TABLE", table)
    patched = fusedres.patch(block().float().to(memory_format=torch.channels_last))
    for _ in range(WARM):
        step(patched, images())
    assert served[-1] and patched.__dict__[STATE].runs_as == "separate"
    with user_table.recorded_keys() as keys:
        step(patched, images())
    assert not served[-1] and keys
    monkeypatch.setattr(choice, "TABLE", {})
    step(patched, images())
    assert not served[-1] and patched.__dict__[STATE].runs_as == "unfused"


def test_what_a_replay_refuses_is_decided_anew(served: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    by_python, patched = bound_block()

    def fails(self: object, *args: object) -> None:
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as broken:
        broken.setattr(replays.Recording, "run", fails)
        broken.setattr(replays.Recording, "run_block", fails)
        broken.setattr(replays, "failed_step", lambda: 0)
        assert_same_step(by_python, patched)
    assert not served[-1]
    assert_same_step(by_python, patched)
    assert not served[-1]  # Python runs the pass from now on


def test_an_error_after_something_was_written_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    _, patched = bound_block()

    def fails(self: object, *args: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(replays.Recording, "run_block", fails)
    monkeypatch.setattr(replays, "failed_step", lambda: 1000)
    with pytest.raises(RuntimeError, match="no such kernel"):
        step(patched, images())


def test_a_bound_block_goes_with_its_last_reference() -> None:
    _, patched = bound_block()
    kept = weakref.ref(patched), weakref.ref(patched.conv1), weakref.ref(patched.conv1.weight)
    assert patched.__dict__[STATE].bound
    gc.collect()
    gc.disable()
    try:
        del patched
        assert [each() for each in kept] == [None, None, None]
    finally:
        gc.enable()


def test_a_bound_block_keeps_nothing_that_was_replaced() -> None:
    _, patched = bound_block()
    kept = weakref.ref(patched.bn1), weakref.ref(patched.conv1.weight)
    patched.bn1 = nn.BatchNorm2d(4)
    patched.conv1.weight = nn.Parameter(patched.conv1.weight.detach().clone())
    gc.collect()
    assert [each() for each in kept] == [None, None]


def test_swapped_parameters_stay_swappable(served: list[bool]) -> None:
    """`torch.utils.swap_tensors` takes no tensor that somebody else holds too."""
    by_python, patched = bound_block()
    for module in (by_python, patched):
        module.zero_grad()
        torch.utils.swap_tensors(module.conv1.weight, nn.Parameter(module.conv1.weight.detach() * 2))
    assert_same_step(by_python, patched)
    assert not served[-1]


def test_images_without_strides_are_refused_as_before(served: list[bool]) -> None:
    _, patched = bound_block()
    errors = []
    for module in (block(), patched):
        with pytest.raises(RuntimeError) as raised:
            module(torch.ones(8, 8).to_sparse_csr())
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_a_recording_that_is_forgotten_as_a_call_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another thread may have it."""
    watched = bound.watch_reader()
    assert watched is not None

    def forgetful(watch: tuple[object, ...], module: nn.Module) -> list[object] | None:
        replays.forget()
        return watched(watch, module)  # type: ignore[return-value]

    monkeypatch.setattr(bound, "watch_reader", lambda: forgetful)
    patched = fusedres.patch(block().float().to(memory_format=torch.channels_last), recipe="separate")
    for _ in range(2 * WARM):
        step(patched, images())
    assert patched.__dict__[STATE].runs_as == "separate"


def test_a_copy_is_bound_to_nothing() -> None:
    _, patched = bound_block()
    state = patched.__dict__[STATE]
    assert state.bound
    assert not copy.deepcopy(patched).__dict__[STATE].bound
    assert not copy.copy(state).bound


def test_calls_of_ever_other_sizes_are_bounded() -> None:
    _, patched = bound_block()
    patched.eval()
    with torch.no_grad(), autocast():
        for size in range(2, 2 + 2 * bound.MOST):
            for _ in range(WARM):
                patched(images(1, 16, size, size))
    assert 0 < len(patched.__dict__[STATE].bound) <= bound.MOST


def test_training_and_inference_in_turn_are_both_known(served: list[bool]) -> None:
    """However often: a block is remembered for each of its modes."""
    _, patched = bound_block()
    for _ in range(fits.MOST_REMEMBERED):
        patched.eval()
        with torch.no_grad(), autocast():
            patched(images())
        patched.train()
        step(patched, images())
    assert served[-2:] == [True, True]


def forget_functions() -> None:
    for function in (from_python.watch_reader, from_python.replay_block, from_python.replay):
        function.cache_clear()


@pytest.mark.parametrize("reason", ["no lock", "not CPython", "no library", "another torch"])
def test_without_what_the_reader_needs_calls_are_resolved(
    reason: str, served: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "no lock":
        monkeypatch.setattr(from_python.sys, "_is_gil_enabled", lambda: False, raising=False)
    elif reason == "not CPython":
        monkeypatch.setattr(from_python.sys.implementation, "name", "another")
    elif reason == "no library":
        monkeypatch.setattr(library, "_is_loaded", False)
    else:
        monkeypatch.delattr(torch._C._aoti, "unsafe_alloc_void_ptrs_from_tensors")
    forget_functions()
    try:
        assert from_python.replay_block() is None
        patched = fusedres.patch(block().float().to(memory_format=torch.channels_last), recipe="separate")
        for _ in range(WARM):
            step(patched, images())
    finally:
        monkeypatch.undo()
        forget_functions()
    assert not served


def test_a_block_with_a_forward_of_its_own_is_not_watched() -> None:
    module = block().float().to(memory_format=torch.channels_last)
    module.conv1.forward = module.conv1.forward  # type: ignore[method-assign]  # as tools leave it
    patched = fusedres.patch(module, recipe="separate")
    for _ in range(WARM):
        step(patched, images())
    state = patched.__dict__[STATE]
    assert state.runs_as == "separate" and not state.bound


def test_equal_tuples_of_names_are_one() -> None:
    names = "stride", "padding"
    assert watch.shared((*names,)) is watch.shared((*names,))
    assert watch.shared((1.0, True)) is not watch.shared((1, True))
    held = [object()]
    assert watch.shared((held,))[0] == (held,)
    assert not any(held in objects for objects, _ in watch._shared.values())
