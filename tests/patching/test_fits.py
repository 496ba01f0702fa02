"""A call is taken for one that was found fit only while nothing that guards look at has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from same_model import assert_same_float64, images
from torch import Tensor, nn

import fusedres
from fusedres.matching.plan import Plan
from fusedres.models import Bottleneck
from fusedres.modules.derived_class import STATE
from fusedres.patching import call, fits

Change = Callable[[Bottleneck], object]


def block() -> Bottleneck:
    torch.manual_seed(0)
    return Bottleneck(16, 4).double()


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


def resized(module: Bottleneck) -> None:
    """In the same storage, and the same parameter."""
    for conv, bn in ((module.conv1, module.bn1),):
        conv.weight.data = conv.weight.data[:2]
        for t in (bn.weight, bn.bias):
            t.data = t.data[:2]
        bn.running_mean, bn.running_var = bn.running_mean[:2], bn.running_var[:2]
    module.conv2.weight.data = module.conv2.weight.data[:, :2]


def transposed(module: Bottleneck) -> None:
    """The same storage, sizes and dtype, other strides."""
    module.conv2.weight.data = module.conv2.weight.data.transpose(0, 1)


def shared(module: Bottleneck) -> None:
    """One norm's buffer is another's vector: their order counts, and the block is left alone."""
    module.bn2.bias.data = module.bn1.running_mean


def moved(module: Bottleneck) -> None:
    module.conv1.weight.data = module.conv1.weight.data.clone()


def biased(module: Bottleneck) -> None:
    """Before a frozen norm: others take every bias away again."""
    module.bn1.eval()
    module.conv1.bias = nn.Parameter(torch.ones(4, dtype=torch.float64))


CHANGES: dict[str, Change] = {
    "eps": lambda m: setattr(m.bn2, "eps", 0.5),
    "momentum": lambda m: setattr(m.bn2, "momentum", 0.5),
    "no momentum": lambda m: setattr(m.bn2, "momentum", None),
    "stride": lambda m: setattr(m.conv2, "dilation", (2, 2)) or setattr(m.conv2, "padding", (2, 2)),
    "padding mode": lambda m: setattr(m.conv2, "padding_mode", "circular"),
    "one norm frozen": lambda m: m.bn1.eval(),
    "untracked": lambda m: setattr(m.bn1, "track_running_stats", False),
    "no statistics": lambda m: setattr(m.bn1, "running_mean", None) or setattr(m.bn1, "running_var", None),
    "no bias": lambda m: setattr(m.bn1, "bias", None),
    "another weight": lambda m: setattr(m.conv1, "weight", nn.Parameter(m.conv1.weight.detach() * 2)),
    "another storage": moved,
    "another size": resized,
    "other strides": transposed,
    "shared": shared,
    "a hook": lambda m: m.conv2.register_forward_hook(lambda mod, x, y: y * 2),
    "values": lambda m: m.conv1.weight.data.mul_(2),
    "frozen weight": lambda m: m.conv1.weight.requires_grad_(False),
    "a bias": biased,
}


def step(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    module.zero_grad(set_to_none=True)
    y = module(x)
    y.backward(images(*y.shape, seed=3))
    return y.detach(), {name: p.grad for name, p in module.named_parameters()}


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
    key = fits.key_of(images())
    assert key in patched.__dict__[STATE].fits
    assert key not in copy.deepcopy(patched).__dict__[STATE].fits
    assert key not in copy.copy(patched.__dict__[STATE]).fits
