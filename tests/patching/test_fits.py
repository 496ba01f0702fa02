"""A call is taken for one that was found fit only while nothing that guards look at has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from block_changes import CHANGES, block, moved, step, transposed
from same_model import assert_same_float64, images
from torch import Tensor, nn

import fusedres
from fusedres.matching.plan import Plan
from fusedres.models import Bottleneck, resnet18
from fusedres.modules.derived_class import STATE
from fusedres.patching import call, fits


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """A plan for each call that was read and guarded."""
    seen: list[Plan] = []
    fit = call.fit

    def counted(plan: Plan, *args: object) -> object:
        seen.append(plan)
        return fit(plan, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(call, "fit", counted)
    return seen


def test_a_call_like_an_earlier_one_is_not_read_again(reads: list[Plan]) -> None:
    patched = fusedres.patch(block(), recipe="separate")
    for seed in range(4):
        patched(images(seed=seed))
    assert len(reads) == 1
    patched(images(2, 16, 5, 5))
    patched.eval()
    patched(images())
    assert len(reads) == 3
    patched.train()
    patched(images(2, 16, 5, 5))
    assert len(reads) == 3  # each form of input has its own


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_two_calls_counts(name: str) -> None:
    """The step after it is the unpatched model's."""
    plain = block()
    patched = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    for module in (plain, patched):
        for _ in range(2):
            step(module, images())
        CHANGES[name](module)
    for _ in range(2):
        (expected, gradients), (actual, found) = (step(m, images()) for m in (plain, patched))
        assert_same_float64(actual, expected, "y")
        for key, gradient in gradients.items():
            assert (found[key] is None) == (gradient is None), key
            if gradient is not None:
                assert_same_float64(found[key], gradient, key)
        for (key, a), (_, b) in zip(patched.named_buffers(), plain.named_buffers(), strict=True):
            assert_same_float64(a.double(), b.double(), key)


def test_a_weight_of_another_layout_is_seen() -> None:
    """In the same storage, of the same sizes."""
    patched = fusedres.patch(block(), recipe="separate")
    for _ in range(2):
        patched(images())
    transposed(patched)
    patched(images())
    assert str(patched.__dict__[STATE].reason).startswith("layout_mixed")


class Expression(Bottleneck):
    """Its shortcut is no convolution and BN, but a module that is called."""

    def __init__(self) -> None:
        super().__init__(16, 4)
        self.shortcut = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def test_where_guards_look_at_more_every_call_is_read(reads: list[Plan]) -> None:
    patched = fusedres.patch(Expression().double(), recipe="separate", strict=True)
    for _ in range(3):
        patched(images())
    assert len(reads) == 3


def test_a_list_of_numbers_is_read_always(reads: list[Plan]) -> None:
    """It could be another one at the next call, and the same object."""
    module = block()
    module.conv1.stride = [1, 1]  # type: ignore[assignment]
    patched = fusedres.patch(module, recipe="separate")
    for _ in range(3):
        patched(images())
    assert len(reads) == 3


def test_where_tensors_move_between_calls_remembering_ends(
    reads: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "MOST_REMEMBERED", 3)
    patched = fusedres.patch(block(), recipe="separate")
    kept = []
    for _ in range(6):
        kept.append(patched.conv1.weight.data)
        moved(patched)
        patched(images())
    assert len(reads) == 6
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairwise(kept))
    assert patched.__dict__[STATE].fits._remembered == 3


def test_what_another_thread_changes_while_a_call_is_read_is_not_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The call itself is mixed, as it was before; the ones after it are not."""
    patched = fusedres.patch(block(), recipe="separate")
    patched.eval()
    fit = call.fit

    def changed(*args: object) -> object:
        found = fit(*args)  # type: ignore[arg-type]
        patched.train()
        return found

    with monkeypatch.context() as during:
        during.setattr(call, "fit", changed)
        patched(images())
    patched(images())
    assert int(patched.bn1.num_batches_tracked) == 1


def test_statistics_of_inference_mode_are_refused_as_torch_refuses_them() -> None:
    with torch.inference_mode():
        plain, other = block(), block()
    for each in (plain, fusedres.patch(other, recipe="separate")):
        with torch.no_grad(), pytest.raises(RuntimeError, match="outside InferenceMode"):
            each(images())


def test_a_copy_of_a_block_remembers_nothing() -> None:
    patched = fusedres.patch(block(), recipe="separate")
    patched(images())
    key = fits.key_of(images(), True)
    assert key in patched.__dict__[STATE].fits
    assert key not in copy.deepcopy(patched).__dict__[STATE].fits
    assert key not in copy.copy(patched.__dict__[STATE]).fits


STEM_CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "pool": lambda m: setattr(m.maxpool, "kernel_size", 2) or setattr(m.maxpool, "padding", 0),
    "ceil": lambda m: setattr(m.maxpool, "ceil_mode", True),
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "weight's layout": lambda m: m.to(memory_format=torch.channels_last),
    "a hook": lambda m: m.bn1.register_forward_hook(lambda mod, x, y: y * 2),
}


@pytest.mark.parametrize("name", [None, *STEM_CHANGES])
def test_a_stem_like_an_earlier_one_is_not_read_again(name: str | None, reads: list[Plan]) -> None:
    torch.manual_seed(0)
    plain = resnet18(num_classes=3).double()
    patched = fusedres.patch(copy.deepcopy(plain), recipe="separate")
    state = patched.__dict__[STATE]
    x = images(2, 3, 33, 33)

    def stems() -> int:
        return sum(plan is state.plan for plan in reads)

    for _ in range(3):
        patched(x), plain(x)
    assert stems() == 1
    if name is not None:
        STEM_CHANGES[name](patched), STEM_CHANGES[name](plain)
    for _ in range(2):
        assert_same_float64(patched(x), plain(x), "y")
        for (key, a), (_, b) in zip(patched.named_buffers(), plain.named_buffers(), strict=True):
            assert_same_float64(a.double(), b.double(), key)
    assert stems() == {None: 1, "a hook": 1, "ceil": 3}.get(
        name, 2
    )  # what is left alone is found so in every call
    patched(x.clone().requires_grad_())  # whose gradient would come in another layout
    assert name is not None or stems() == 2
