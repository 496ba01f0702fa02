"""The advice of a reason code, followed: the block then runs fused. Where there is nothing to do, the list says so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from refused_blocks import OwnTensor, frozen, lazy, with_forward, with_shadow
from spellings import InlineShortcut, InPlaceAdd, PooledShortcut, SharedNorm
from torch import Tensor, nn

import fusedres
from fusedres.patching.reasons import REASONS

pytestmark = pytest.mark.filterwarnings("ignore:fusedres.patch. no residual block")
PAGE = Path(__file__).parents[2] / "docs" / "pages" / "reasons.md"
# the original forward is what is wanted, or what raises; or another model would be needed, or another installation
NOTHING_TO_DO = {
    *("not_residual", "no_final_relu", "unsupported_op", "activation_not_relu", "dry_run_failed", "random"),
    *("unsupported_module", "class_resists", "checkpointed", "deep_stem", "stem_differs", "stem_not_called"),
    *("tracing", "fake_mode", "forward_ad", "empty_batch", "geometry_changed", "parameter_shape"),
    *("input_channels", "no_1x1_expansion", "few_values_per_channel", "float32_product", "slow_float64"),
    "no_plain_convolution",
    *("no_faster_recipe", "measuring", "too_small", "compiled", "not_measured_here", "native_missing"),
}
# the line that is in the way comes out of the forward: what is left is a block like InPlaceAdd, which fuses
OTHER_FORWARD = {
    *("mode_dependent", "shape_dependent", "grad_mode_dependent", "dtype_dependent", "layout_dependent"),
    *("asks_device", "enters_state", "asks_state", "asks_own_class", "checks_input", "not_called"),
    *("hidden_write", "mutates_input", "mutates_module", "profiler_label", "script_or_graph_module"),
}


def images(*shape: int) -> Tensor:
    return torch.ones(shape or (2, 16, 6, 6))


def patched(block: nn.Module) -> nn.Module:
    return fusedres.patch(block, recipe="separate")


class Advice(NamedTuple):
    """A call that a code is given for, and what its entry says to do.

    build: a block, patched; spoil: makes the call one with that code; follow: does what is advised, and returns what
    to call and with what.
    """

    follow: Callable[[nn.Module], tuple[nn.Module, Tensor]]
    spoil: Callable[[nn.Module], object] = lambda block: None
    build: Callable[[], nn.Module] = InPlaceAdd
    given: Tensor | None = None


def again(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], tuple[nn.Module, Tensor]]:
    """The advice changes the block, which is then called as it is."""

    def follow(block: nn.Module) -> tuple[nn.Module, Tensor]:
        change(block)
        return block, images()

    return follow


def instead(x: Tensor) -> Callable[[nn.Module], tuple[nn.Module, Tensor]]:
    """The advice is another input."""
    return lambda block: (block, x)


def put(path: str, value: object) -> Callable[[nn.Module], object]:
    owner, _, name = path.rpartition(".")
    return lambda block: setattr(block.get_submodule(owner), name, value)


def hang_hook(block: nn.Module) -> None:
    block.handle = block.bn1.register_forward_hook(lambda *args: None)


def own_class() -> nn.Module:
    return type("Own", (InPlaceAdd,), {})()


def replace_forward(block: nn.Module) -> None:
    type(block).forward = lambda self, x: InPlaceAdd.forward(self, x)


def share_means(block: nn.Module) -> None:
    block.bn2.running_mean = block.bn1.running_mean


def initialise(block: nn.Module) -> None:
    block(images())
    patched(block)


def take_off(name: str) -> Callable[[nn.Module], object]:
    def take(block: nn.Module) -> None:
        path, _, leaf = name.rpartition(".")
        del vars(block.get_submodule(path))[leaf]
        patched(block)

    return take


def freeze(block: nn.Module) -> tuple[nn.Module, Tensor]:
    block.bn1.running_var.requires_grad_(False)
    return block, images(2, 32, 6, 6)


class OwnReLU(nn.ReLU):
    """A ReLU of another class."""


channels_last = {"memory_format": torch.channels_last}
ADVICE: dict[str, Advice] = {
    "signature": Advice(instead(images()), given=[1]),  # type: ignore[arg-type]
    "tensor_subclass": Advice(instead(images().as_subclass(Tensor)), given=images().as_subclass(OwnTensor)),
    "hooks": Advice(again(lambda block: block.handle.remove()), hang_hook),
    "module_replaced": Advice(again(patched), put("relu", OwnReLU())),
    "forward_replaced": Advice(again(patched), replace_forward, own_class),
    "attribute_changed": Advice(
        again(put("conv1.padding_mode", "zeros")), put("conv1.padding_mode", "reflect")
    ),
    "unusual_number": Advice(
        again(lambda block: setattr(block.bn1, "momentum", float(block.bn1.momentum))),
        put("bn1.momentum", torch.tensor(0.1)),
    ),
    "eps_not_positive": Advice(again(put("bn2.eps", 1e-5)), put("bn2.eps", -1.0)),
    "shared_statistics": Advice(again(put("bn2.running_mean", torch.zeros(16))), share_means),
    "input_rank": Advice(instead(images(16, 6, 6).unsqueeze(0)), given=images(16, 6, 6)),
    "single_value_per_channel": Advice(instead(images(2, 16, 1, 1)), given=images(1, 16, 1, 1)),
    "dtype": Advice(
        again(lambda block: block.to(torch.float32)), put("bn1.running_mean", torch.zeros(16).half())
    ),
    "trainable_statistics": Advice(
        freeze,
        lambda block: block.bn1.running_var.requires_grad_(),
        frozen,
        images(2, 32, 6, 6),
    ),
    "device": Advice(instead(images()), given=images().to("meta")),
    "layout_mixed": Advice(
        instead(images().to(**channels_last)), lambda block: block.to(**channels_last), given=images()
    ),
    "uninitialised": Advice(again(initialise), build=lazy),
    "instance_shadows": Advice(again(take_off("conv1._conv_forward")), build=with_shadow),
    "instance_forward": Advice(again(take_off("forward")), build=with_forward),
    "excluded": Advice(again(patched), lambda block: fusedres.patch(fusedres.unpatch(block), exclude="*")),
    "shared_module": Advice(lambda block: (patched(InPlaceAdd()), images()), build=SharedNorm),
    "shortcut_not_a_module": Advice(
        lambda block: (patched(PooledShortcut()), images()), build=InlineShortcut
    ),
}


def code_of(block: nn.Module) -> str:
    return (fusedres.report(block).blocks[0].code or "").partition(":")[0]


@pytest.mark.parametrize("code", ADVICE)
def test_followed_it_gives_a_fused_call(code):
    follow, spoil, build, given = ADVICE[code]
    block = patched(build())
    spoil(block)
    if fusedres.is_patched(block):  # the original forward may reject the call: its code is what is asked for
        with contextlib.suppress(RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError):
            block(images() if given is None else given)
    assert code_of(block) == code
    block, x = follow(block)
    block(x)
    (row,) = fusedres.report(block).blocks
    assert (row.runs_as, row.code) == ("separate", None)


def test_leaving_the_context_of_disabled():
    block = patched(InPlaceAdd())
    with fusedres.disabled():
        block(images())
    assert code_of(block) == "disabled"
    block(images())
    assert code_of(block) == ""


def test_every_code_has_its_advice_or_none_to_give():
    elsewhere = {"disabled", "layout_nchw", "not_warm"}  # above, in test_layouts.py and in test_warm_calls.py
    parts = (set(ADVICE), NOTHING_TO_DO, OTHER_FORWARD, elsewhere)
    assert sum(map(len, parts)) == len(REASONS) and set().union(*parts) == set(REASONS)


def test_no_advice_is_to_force_a_recipe_unmeasured():
    """Forced on small calls, a recipe is slower than the original forward."""
    assert not [code for code, sentence in REASONS.items() if "recipe=" in sentence]
    for entry in PAGE.read_text().split("\n### ")[1:]:
        if 'recipe="separate"' in entry:
            assert "may be slower" in entry or "measure" in entry, entry
