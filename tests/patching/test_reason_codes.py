"""Every reason code there is, produced by a block that deserves it, with the detail that tells what was found."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from impure_blocks import FunctionalNorm, LooksAtGradient, LooksAtGradMode, LooksAtWidth, WritesThroughData
from library_models import KeepsTheImage, TimmResNet, deep
from look_alikes import BranchOff, Checkpointed, LeakyReLUs
from refused_blocks import (
    AsksDevice,
    AsksOwnClass,
    ChecksInput,
    EntersState,
    Fails,
    GivesFloat64,
    Labelled,
    OwnTensor,
    PassesStemBy,
    Reformats,
    Resists,
    frozen,
    lazy,
    projected,
    scripted,
    subclassed_norm,
    with_forward,
    with_shadow,
)
from spellings import (
    BareAddition,
    InlineShortcut,
    InPlaceAdd,
    MutatesInput,
    PooledShortcut,
    PythonRandom,
    SharedNorm,
    SqueezeExcite,
    StoresState,
    TrainingBranch,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from trials_on import trials_on, without_proof

import fusedres
from fusedres.blocks import choice, gram_form, user_table
from fusedres.blocks.choice import cause_before_reading
from fusedres.blocks.unfused import Measured
from fusedres.models import BasicBlock, Bottleneck, resnet18
from fusedres.nn.residual_block import read_block
from fusedres.ops import triton_reasons
from fusedres.ops.native import library
from fusedres.patching import guards, warm
from fusedres.patching.reasons import REASONS, describe
from fusedres.patching.search import plan_again

pytestmark = pytest.mark.filterwarnings("ignore:fusedres.patch. no residual block")


def images(*shape: int) -> Tensor:
    return torch.ones(shape or (2, 16, 6, 6))


def code_of(model: nn.Module) -> str:
    """Of the first row of the report."""
    return fusedres.report(model).blocks[0].code or "no code"


def matched(build: Callable[[], nn.Module], **options) -> Callable[[], str]:
    """The code that a module is given when it is patched."""
    return lambda: code_of(fusedres.patch(nn.Sequential(build()), dry_run=True, **options))


def stem_passed_by() -> str:
    model = resnet18(num_classes=2)
    model.__class__ = PassesStemBy
    return code_of(fusedres.patch(model, dry_run=True))


MATCHING: dict[str, Callable[[], str]] = {
    "not_residual": lambda: str(plan_again(BranchOff(), "forward")),
    "no_final_relu": matched(BareAddition),
    "unsupported_op:MeanBackward1, Mul, Sigmoid": matched(SqueezeExcite),
    "activation_not_relu:LeakyRelu": matched(LeakyReLUs),
    "mode_dependent": matched(TrainingBranch),
    "shape_dependent": matched(LooksAtWidth),
    "grad_mode_dependent": matched(LooksAtGradient),
    "dtype_dependent": matched(GivesFloat64),
    "layout_dependent": matched(Reformats),
    "asks_device": matched(AsksDevice),
    "enters_state": matched(EntersState),
    "asks_state:is_grad_enabled": matched(LooksAtGradMode),
    "asks_own_class": matched(AsksOwnClass),
    "class_resists:Resists answers for its __class__ itself": matched(Resists),
    "checks_input:ValueError": matched(ChecksInput),
    "not_called": matched(FunctionalNorm),
    "hidden_write": matched(WritesThroughData),
    "dry_run_failed:KeyError": matched(Fails),
    "mutates_input": matched(MutatesInput),
    "mutates_module": matched(StoresState),
    "checkpointed": matched(Checkpointed),
    "profiler_label": matched(Labelled),
    "uninitialised": matched(lazy),
    "random": matched(PythonRandom),
    "shared_module": matched(SharedNorm),
    "unsupported_module:Unregistered": matched(subclassed_norm),
    "shortcut_not_a_module": matched(InlineShortcut),
    "deep_stem": lambda: code_of(fusedres.patch(deep(TimmResNet()), dry_run=True)),
    "stem_differs": lambda: code_of(fusedres.patch(KeepsTheImage(), dry_run=True)),
    "stem_not_called": stem_passed_by,
    "instance_forward": matched(with_forward),
    "instance_shadows:conv1._conv_forward": matched(with_shadow),
    "script_or_graph_module": matched(scripted),
    "excluded": matched(InPlaceAdd, exclude="*"),
}


def called(
    change: Callable[[nn.Module], object] = lambda block: None,
    build: Callable[[], nn.Module] = InPlaceAdd,
    call: Callable[[nn.Module], object] = lambda block: block(images()),
    recipe: str = "separate",
) -> Callable[[], str]:
    """The code of a call: of a patched block that was changed since."""

    def produce() -> str:
        block = fusedres.patch(build(), recipe=recipe, strict=True)
        change(block)
        with contextlib.suppress(ValueError, RuntimeError, TypeError, NotImplementedError, AttributeError):
            call(block)  # the original forward may reject the call
        return code_of(block)

    return produce


def given(x: Tensor, change: Callable[[nn.Module], object] = lambda block: None) -> Callable[[], str]:
    return called(change, call=lambda block: block(x))


def written(path: str, value: object, build: Callable[[], nn.Module] = InPlaceAdd, **options):
    """The code of a call once an attribute of a submodule was written."""
    owner, _, name = path.rpartition(".")
    return called(lambda block: setattr(block.get_submodule(owner), name, value), build, **options)


def parameter(*shape: int, **options) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape, **options))


def disabled(block: nn.Module) -> None:
    with fusedres.disabled():
        block(images())


def fake(block: nn.Module) -> None:
    x = images()
    with FakeTensorMode(allow_non_fake_inputs=True):
        block(x)


def forward_ad(block: nn.Module) -> None:
    with torch.autograd.forward_ad.dual_level():
        block(images())


def globally_hooked(block: nn.Module) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        block(images())
    finally:
        handle.remove()


def share_means(block: nn.Module) -> None:
    block.bn2.running_mean = block.bn1.running_mean


def share_with_shortcut(block: nn.Module) -> None:
    block.downsample[2].running_mean = block.path[7].running_mean


def replace_forward(block: nn.Module) -> None:
    type(block).forward = lambda self, x: x


def other_stem_pool(model: nn.Module) -> None:
    model.maxpool.kernel_size = (2, 3)


def on_cuda() -> str:
    """An NCHW input on a GPU, as far as the guard asks: there need be none."""

    class OnGPU:
        layout, dtype, is_cuda = torch.strided, torch.float32, True
        device = torch.device("cuda")
        dim, numel, stride = (lambda _: 4), (lambda _: 8), (lambda _: (8, 4, 2, 1))

        def is_contiguous(self, memory_format):
            return memory_format is torch.contiguous_format

    return guards.unfit_input(OnGPU(), False) or ""  # type: ignore[arg-type]


def gram_on_a_gpu(dtype: torch.dtype, capability: tuple[int, int]) -> str:
    """Why `gram` leaves a block on a GPU of this capability, as far as it asks: there need be none."""
    block = Bottleneck(32, 8)
    units = [
        fusedres.nn.ConvBN(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"), True) for i in (1, 2, 3)
    ]
    data = read_block(images(2, 32, 4, 4), units, None, True)

    class OnGPU:
        device = torch.device("cuda")

    found = {OnGPU.device: capability in triton_reasons.FULL_FLOAT64}
    with mock.patch.object(gram_form, "has_full_float64", found.__getitem__):
        return gram_form.unsuitable(data.config._replace(dtype=dtype), data.tensors, OnGPU()) or ""  # type: ignore[arg-type]


def captured_cold(block: nn.Module) -> None:
    """A call as a CUDA graph's capture has it, as far as is asked: there need be no GPU."""
    with (
        mock.patch.object(warm, "on_gpu", lambda x: True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
    ):
        block(images())


FLOAT32 = "cpu", "native", torch.float32, True
BFLOAT16 = "cpu", "native", torch.bfloat16, True
SMALL, LARGE = Measured("separate", 1, 16, ""), Measured("separate", 9000, 16, "")


def auto(
    table, backend: str = "auto", built: bool = True, gradients: bool = True, double: bool = False
) -> str:
    """The code of a call under "auto" with that table."""
    with (
        mock.patch.object(choice, "TABLE", table),
        mock.patch.object(library, "is_built", lambda: built),
        mock.patch.object(library, "instruction_set", lambda: "avx1"),
        torch.set_grad_enabled(gradients),
    ):
        block, x = fusedres.patch(InPlaceAdd(), backend=backend), images()
        block.double()(x.double()) if double else block(x)
        return code_of(block)


def measured_unfused() -> str:
    """The code of a call for which the user's table names the original forward."""
    block, x = fusedres.patch(InPlaceAdd()), images()
    with user_table.recorded_keys() as keys:
        block(x)
    with (
        mock.patch.object(user_table, "table", lambda: {keys[-1]: user_table.Entry("unfused", 1.0)}),
        mock.patch.object(user_table, "devices", lambda: {keys[-1].device}),
    ):
        block(x)
    return code_of(block)


def grouped_basic() -> nn.Module:
    """A basic block whose second convolution has groups."""
    block = BasicBlock(16, 16)
    block.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False)
    return block


def on_trial() -> str:
    """The code of a call that no table is for, and that is measured."""
    with tempfile.TemporaryDirectory() as folder, trials_on(Path(folder)) as patching:
        without_proof(patching)
        return called(recipe="auto")()


CALLED: dict[str, Callable[[], str]] = {
    "disabled": called(call=disabled),
    "native_missing": lambda: auto({}, built=False),
    "not_measured_here:kernels for avx1": lambda: auto({}),
    "not_measured_here:cpu, float32": lambda: auto({FLOAT32: (LARGE,)}, gradients=False),
    "not_measured_here:backend reference": lambda: auto({FLOAT32: (SMALL,)}, backend="reference"),
    "not_measured_here:triton, device_cpu": lambda: auto(
        {("cpu", "triton", *FLOAT32[2:]): (SMALL,)}, "triton"
    ),
    "too_small:1,152 elements of x, needed 9,000": lambda: auto({FLOAT32: (LARGE,)}),
    "too_small:16 channels, needed 64": lambda: auto({FLOAT32: (LARGE._replace(least_channels=64),)}),
    "dtype:input, float64, needed bfloat16 or float32": lambda: auto(
        {FLOAT32: (SMALL,), BFLOAT16: (SMALL,)}, double=True
    ),
    "compiled": lambda: cause_before_reading(images(), 16, True) or "",
    "no_faster_recipe": measured_unfused,
    "measuring:0/7": on_trial,
    "not_warm:input, [2, 16, 6, 6]": called(call=captured_cold),
    "no_1x1_expansion": called(recipe="gram"),
    "no_plain_convolution": called(build=grouped_basic, recipe="prologue"),
    "float32_product": lambda: gram_on_a_gpu(torch.float32, (8, 0)),
    "slow_float64": lambda: gram_on_a_gpu(torch.bfloat16, (8, 9)),
    "few_values_per_channel": called(
        build=lambda: Bottleneck(32, 8), call=lambda block: block(images(2, 32, 1, 1)), recipe="gram"
    ),
    "signature:x=": called(call=lambda block: block(x=images())),
    "signature:list": called(call=lambda block: block([1])),
    "tensor_subclass:input, OwnTensor": given(images().as_subclass(OwnTensor)),
    "tensor_subclass:input, sparse_coo": given(images().to_sparse()),
    "tensor_subclass:conv2.weight, OwnTensor": written(
        "conv2.weight", nn.Parameter(images(16, 16, 3, 3).as_subclass(OwnTensor))
    ),
    "tracing:torch.func": called(call=lambda block: torch.func.vmap(block.eval())(images(3, 2, 16, 6, 6))),
    "tracing:make_fx": called(call=lambda block: make_fx(block.eval())(images())),
    "tracing:torch.jit": called(
        call=lambda block: torch.jit.trace(block.eval(), images(), check_trace=False)
    ),
    "fake_mode": called(call=fake),
    "forward_ad": called(call=forward_ad),
    "hooks:bn1": called(lambda block: block.bn1.register_forward_hook(lambda *args: None)),
    "hooks:on all modules": called(call=globally_hooked),
    "hooks:register_backward_hook of the block": called(
        lambda b: b.register_backward_hook(lambda *args: None)
    ),
    "module_replaced:relu": written("relu", nn.SiLU()),
    "forward_replaced:Own.forward": called(replace_forward, build=lambda: type("Own", (InPlaceAdd,), {})()),
    "attribute_changed:conv1.padding_mode": written("conv1.padding_mode", "reflect"),
    "geometry_changed:conv2, gives 3x3, the shortcut 6x6": written("conv2.stride", (2, 2)),
    "geometry_changed:conv1.dilation, (0, 1)": written("conv1.dilation", (0, 1)),
    "geometry_changed:conv1, gives -10x-10": written("conv1.dilation", (9, 9)),
    "geometry_changed:conv2, gives 6x6, the shortcut 3x3": written("downsample.0.stride", (2, 2), projected),
    (
        "geometry_changed:maxpool, kernel_size=(2, 3), stride=2, padding=1, dilation=1, ceil_mode=False"
    ): called(other_stem_pool, lambda: resnet18(num_classes=2), call=lambda m: m(images(2, 3, 33, 33))),
    "unusual_number:stride, Tensor": written("conv1.stride", torch.tensor(1)),
    "eps_not_positive:bn2.eps, -1.0": written("bn2.eps", -1.0),
    "shared_statistics:bn1.running_mean, bn2.running_mean": called(share_means),
    "shared_statistics:path.7.running_mean, a buffer of the shortcut": called(
        share_with_shortcut, PooledShortcut
    ),
    "parameter_shape:conv2.weight, [16, 16, 3]": written("conv2.weight", parameter(16, 16, 3)),
    "parameter_shape:conv2.weight, None": written("conv2.weight", None),
    "parameter_shape:bn1.weight, [8], needed [16]": written("bn1.weight", parameter(8)),
    "parameter_shape:bn1.running_var, None beside a running_mean": written("bn1.running_var", None),
    "parameter_shape:conv2.weight, 8 channels, needed 16": written("conv2.weight", parameter(16, 8, 3, 3)),
    "input_rank:input, [16, 6, 6]": given(images(16, 6, 6)),
    "input_channels:input of conv1, 8 channels, needed 16": given(images(2, 8, 6, 6)),
    "empty_batch:input, [0, 16, 6, 6]": given(images(0, 16, 6, 6)),
    "single_value_per_channel:bn1": given(images(1, 16, 1, 1)),
    "dtype:input, int32": given(images().int()),
    "dtype:conv2.weight, float64, needed float32": written(
        "conv2.weight", parameter(16, 16, 3, 3, dtype=torch.float64)
    ),
    "dtype:bn1.running_mean, float16, needed float32": written("bn1.running_mean", images(16).half()),
    "dtype:bn1.weight, float64, needed float32": written("bn1.weight", images(16).double(), frozen),
    "trainable_statistics:bn1.running_var": called(lambda b: b.bn1.running_var.requires_grad_(), frozen),
    "device:input, meta": given(images().to("meta")),
    "device:conv2.weight, meta, needed cpu": written("conv2.weight", parameter(16, 16, 3, 3, device="meta")),
    "layout_mixed:conv1.weight, channels_last": called(lambda b: b.to(memory_format=torch.channels_last)),
    "layout_nchw:input, strides (8, 4, 2, 1)": on_cuda,
}
if library.is_built():
    CALLED["layout_nchw:input, strides (576, 36, 6, 1)"] = lambda: auto({FLOAT32: (SMALL,)})
CASES = MATCHING | CALLED


@pytest.mark.parametrize("expected", CASES)
def test_the_code_and_its_detail(expected):
    found = CASES[expected]()
    assert found == expected
    _, _, detail = found.partition(":")
    assert describe(found).endswith(f"({detail})" if detail else REASONS[found])


def test_every_code_is_produced():
    assert {code.partition(":")[0] for code in CASES} == set(REASONS)
