"""The compiled library itself: what it refuses, what it needs from outside, and how it fails."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import native_symbols
import pytest
import torch

import fusedres
from fusedres.ops.backend import REASONS
from fusedres.ops.cases import SMALL, cases
from fusedres.ops.contract import (
    BnAddReluForward,
    BnScaleShift,
    BnStats,
    Conv1x1Forward,
    ConvBackwardInput,
    ConvBackwardWeight,
    Gram,
)
from fusedres.ops.native import functions, library, products, reasons

pytestmark = pytest.mark.skipif(not library.is_built(), reason="no compiled library in this installation")


def image(channels=8, dtype=torch.float32, size=4):
    return torch.randn(2, channels, size, size).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def ops():
    library.load()
    return torch.ops.fusedres_native


v = torch.ones(8)
BAD_CALLS = {
    "rank": ("bn_stats", lambda c: (c[0],), r"bn_stats: c is \[8, 4, 4\], needed \[N, C, H, W\]; "),
    "dtype": ("bn_stats", lambda c: (c.half(),), "c is float16, needed float32 or bfloat16; convert"),
    "layout": ("bn_stats", lambda c: (c.contiguous(),), "c is not channels_last, needed dense channels_last"),
    "slice": ("bn_stats", lambda c: (c[:, ::2],), "c is not channels_last"),
    "overlap": ("bn_stats", lambda c: (c[:, :, :1, :1].expand(2, 8, 4, 4),), "c is not channels_last"),
    "no channels": ("bn_stats", lambda c: (c[:, :0],), "at least one channel"),
    "vector length": (
        "bn_add_relu_forward",
        lambda c: (c, v[:7], v, None, None, None, True, False),
        r"scale is \[7\], needed contiguous \[8\]; pass one value a channel",
    ),
    "vector dtype": (
        "bn_add_relu_forward",
        lambda c: (c, v.double(), v, None, None, None, True, False),
        "scale is float64, needed float32",
    ),
    "vector stride": (
        "bn_add_relu_forward",
        lambda c: (c, torch.ones(16)[::2], v, None, None, None, True, False),
        r"scale is \[8\] of strides \[2\], needed contiguous \[8\]",
    ),
    "residual shape": (
        "bn_add_relu_forward",
        lambda c: (c, v, v, image(8, size=3), None, None, True, False),
        r"residual is \[2, 8, 3, 3\], needed \[2, 8, 4, 4\]",
    ),
    "residual dtype": (
        "bn_add_relu_forward",
        lambda c: (c, v, v, c.bfloat16(), None, None, True, False),
        "residual is bfloat16, needed float32",
    ),
    "residual layout": (
        "bn_add_relu_forward",
        lambda c: (c, v, v, c.contiguous(), None, None, True, False),
        "residual is not channels_last",
    ),
    "half a pair": (
        "bn_add_relu_forward",
        lambda c: (c, v, v, c, v, None, True, False),
        "residual_scale, residual_shift is given in part, needed both or neither",
    ),
    "scale of no residual": (
        "bn_add_relu_forward",
        lambda c: (c, v, v, None, v, v, True, False),
        "residual is None, needed a tensor like c",
    ),
    "mask length": (
        "bn_add_relu_backward_reduce",
        lambda c: (c, c, v, v, v, torch.zeros(31, dtype=torch.uint8), True, None, None),
        r"mask is uint8 \[31\], needed contiguous uint8 \[32\]",
    ),
    "mask dtype": (
        "relu_backward",
        lambda c: (c, torch.zeros(32, dtype=torch.int32)),
        r"mask is int32 \[32\], needed contiguous uint8",
    ),
    "mask stride": (
        "relu_backward",
        lambda c: (c, torch.zeros(64, dtype=torch.uint8)[::2]),
        r"mask is uint8 \[32\] of strides \[2\], needed contiguous uint8 \[32\]",
    ),
    "rows": ("bn_backward_coefficients", lambda c: (v, v, v, v, v, -1, True), r"rows is -1, needed N\*H\*W"),
    "weight rank": (
        "conv_backward_input",
        lambda c: (c, torch.ones(8, 16), None, None),
        r"weight is \[8, 16\], needed \[N, C, H, W\]; pass a batch of images, or a convolution's weight",
    ),
    "convolution in place": (
        "conv_backward_input_",
        lambda c: (c, c, torch.ones(8, 9, 1, 1), 1, 1),
        r"dx is \[2, 8, 4, 4\], needed 9 channels",
    ),
    "huge padding": (
        "conv_backward_weight",
        lambda c: (c, c, 3, 3, 1, 1, 2**62 + 1, 1, 1, 1),
        r"padding 4611686018427387905, dilation 1, needed .*, none above 2\^20",
    ),
    "huge dilation": (
        "conv_backward_weight",
        lambda c: (c, c, 3, 3, 1, 1, 1, 1, 1, 2**62),
        r"dilation 4611686018427387904, needed .*, none above 2\^20",
    ),
    "dy shape": (
        "bn_add_relu_backward_reduce",
        lambda c: (image(9), c, v, v, v, None, True, None, None),
        r"dy is \[2, 9, 4, 4\], needed \[2, 8, 4, 4\]",
    ),
    "shortcut without mean": (
        "bn_add_relu_backward_reduce",
        lambda c: (c, c, v, v, v, None, True, c, None),
        "shortcut_c, shortcut_mean is given in part",
    ),
    "B without K": (
        "bn_add_relu_backward_input",
        lambda c: (c, c, v, v, v, v, None, None, True, None, None, None, None, False),
        "B, K is given in part",
    ),
    "shortcut without A": (
        "bn_add_relu_backward_input",
        lambda c: (c, c, v, v, v, v, v, None, True, c, None, None, None, False),
        "shortcut_c, shortcut_A is given in part",
    ),
    "var length": ("bn_scale_shift", lambda c: (v, v[:3], None, None, 1e-5), r"var is \[3\], needed"),
    "sum length": (
        "bn_backward_coefficients",
        lambda c: (v, v[:3], v, v, v, 1, True),
        r"sum_dz_centered is \[3\], needed",
    ),
    "padding": (
        "bn_relu_maxpool_forward",
        lambda c: (c, v, v, 3, 2, 2),
        "padding 2, needed kernel_size 1 to 15",
    ),
    "stride": ("bn_relu_maxpool_forward", lambda c: (c, v, v, 3, 0, 1), "stride 0, padding 1, needed"),
    "window": ("bn_relu_maxpool_forward", lambda c: (c, v, v, 7, 2, 0), "needed at least one window"),
    "pooled shape": (
        "bn_relu_maxpool_backward_reduce",
        lambda c: (c, c.to(torch.uint8), c, v, 3, 2, 1),
        r"dy is \[2, 8, 4, 4\], needed the shape of the pooled output",
    ),
    "indices dtype": (
        "bn_relu_maxpool_backward_input",
        lambda c: (image(size=2), image(size=2), c, v, v, v, 3, 2, 1),
        "indices is float32, needed uint8",
    ),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_refuses(ops, what):
    op, arguments, message = BAD_CALLS[what]
    with pytest.raises(RuntimeError, match=message) as caught:
        getattr(ops, op)(*arguments(image()))
    assert f"fusedres {op}: " in str(caught.value)


def test_calls_of_what_is_on_gpus_alone_are_those_of_the_schemas(ops):
    """torch reads the arguments before it looks for a kernel; that of conv3x3_backward_input takes fewer of them."""
    for op in (case.op for case in cases(SMALL[0], torch.bfloat16, torch.device("cpu"))):
        if type(op) in products.PRODUCTS and type(op) not in reasons.REASONS:
            with pytest.raises(RuntimeError, match=r"'CPU' backend|fusedres conv3x3_backward_input: "):
                functions.FUNCTIONS[type(op)](op)


def test_supports_says_why():
    backend, c = functions.backend(), image()
    weight, window = torch.ones(4, 8, 1, 1), ((1, 1), (0, 0), (1, 1))
    expected = (
        (BnStats(c), None),
        (BnStats(c.half()), "dtype_float16"),
        (BnStats(c.double()), "dtype_float64"),
        (BnStats(c.contiguous()), "not_channels_last"),
        (BnStats(c.to("meta")), "device_meta"),
        (BnStats(image(0)), "no_channels"),
        (BnAddReluForward(c, v, v, c.bfloat16()), "mixed_dtypes"),
        (BnAddReluForward(c, v, v, c.to("meta")), "mixed_devices"),
        (BnAddReluForward(c, v, v, c[0]), "not_four_dimensional"),
        (BnScaleShift(v, v, v.half(), v, 1e-5), "vector_not_float32"),
        (BnScaleShift(v, v, torch.ones(16)[::2], v, 1e-5), "vector_not_dense"),
        (BnScaleShift(v, v, v.to("meta"), v, 1e-5), "mixed_devices"),
        (Gram(c, v, v), "no_kernel"),
        (Conv1x1Forward(c, weight, save_stats=True), "library_as_fast"),
        (Conv1x1Forward(image(64), torch.ones(64, 64, 1, 1), save_stats=True), None),
        (Conv1x1Forward(c, weight, in_scale=v, in_shift=v), "in_training"),
        (Conv1x1Forward(c, weight, v[:4], scale=v[:4], shift=v[:4]), "stride_or_bias"),
        (ConvBackwardInput(c, c, torch.ones(8, 8, 3, 3), *window, 1), "not_pointwise"),
        (ConvBackwardInput(c, c, torch.ones(8, 8, 1, 1).double(), *window, 1), "mixed_dtypes"),
        (ConvBackwardInput(c, c, torch.ones(8, 8, 1, 1), (2, 2), *window[1:], 1), "library_as_fast"),
        (ConvBackwardWeight(c, c, (3, 3), (1, 1), (1, 1), (1, 1), 2), "groups"),
    )
    for op, reason in expected:
        assert backend.reason(op) == reason, (type(op).__name__, reason)
        assert reason is None or any(reason == code or reason.startswith(f"{code}_") for code in REASONS)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_repeat_bitwise_for_a_thread_count(ops, threads, dtype):
    c = image(24, dtype, size=128)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = ops.bn_stats(c)
        assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, ops.bn_stats(c), strict=True))
    finally:
        torch.set_num_threads(before)


def test_needs_only_the_stable_abi_and_an_old_system():
    assert native_symbols.violations(library.LIBRARY) == []
    assert "libtorch_cpu.so" in native_symbols.needed_libraries(library.LIBRARY)


BAD_LIBRARY = """
#include <threads.h>
void PyErr_Clear(void), _ZN3c105ErrorC1Ev(void), torchvision_new(void);
void fusedres_shown(thrd_t t) { PyErr_Clear(); _ZN3c105ErrorC1Ev(); torchvision_new(); thrd_join(t, 0); }
"""


@pytest.mark.parametrize(
    "seen",
    [
        "Python symbol PyErr_Clear",
        "C++ symbol of libtorch _ZN3c105ErrorC1Ev",
        "not in torch's stable ABI: torchvision_new",
        "newer than manylinux_2_28: thrd_join@GLIBC_2.34",
        "needs libcudart.so.13",
        "exports fusedres_shown",
    ],
)
def test_a_library_that_breaks_its_promise_is_seen(tmp_path, seen):
    other, bad = tmp_path / "libcudart.so.13", tmp_path / "bad.so"
    for source, *arguments in (
        ("void cudart(void) {}", other, "-Wl,-soname,libcudart.so.13"),
        (BAD_LIBRARY, bad, "-Wl,--no-as-needed", other),
    ):
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-x", "none", "-o", *arguments]
        subprocess.run(command, input=source, text=True, check=True)
    assert seen in native_symbols.violations(bad)


def run_python(code, site=Path(fusedres.__file__).parent.parent):
    """In a process that imports the package from the folder `site`."""
    command = [sys.executable, "-P", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


FALLBACK = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fusedres
from fusedres.ops import dispatch
said = [str(w.message) for w in caught]
assert len(said) == 1 and {needed!r} in said[0], said
assert "native" not in dispatch.LOADERS and dispatch.dispatcher().backends[-1].name == "reference"
try:
    dispatch.check_backend("native")
except fusedres.BackendUnavailableError as error:
    assert str(error) == said[0], error
else:
    raise AssertionError("no error")
"""


def package_with(content, folder):
    """The package with another library, for PYTHONPATH; content: its bytes, None for none."""
    source = Path(fusedres.__file__).parent
    shutil.copytree(source, folder / "fusedres", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if content is not None:
        (folder / "fusedres" / library.LIBRARY.name).write_bytes(content)
    return folder


# in the code, the section headers at the end, the segments' headers, the first header
CUTS = {"half": 0.5, "one byte": 1 - 1e-9, "headers": 100, "first header": 60}


@pytest.mark.parametrize("cut", CUTS)
def test_a_library_cut_short_is_one_warning_and_the_fallback(tmp_path, cut):
    whole = library.LIBRARY.read_bytes()
    size = int(CUTS[cut] if CUTS[cut] > 1 else CUTS[cut] * len(whole))
    needed = "does not load" if size < 64 else f"cut short: found {size} bytes, needed "
    done = run_python(FALLBACK.format(needed=needed), package_with(whole[:size], tmp_path))
    assert done.returncode == 0, done.stderr


def test_a_broken_library_is_one_warning_and_the_fallback(tmp_path):
    code = FALLBACK.format(needed="does not load with torch")
    done = run_python(code, package_with(b"not a library", tmp_path))
    assert done.returncode == 0, done.stderr


def test_no_library_is_the_fallback_and_says_so_when_asked(tmp_path):
    code = "from fusedres.ops import dispatch\ndispatch.check_backend('native')"
    done = run_python(code, package_with(None, tmp_path))
    assert "BackendUnavailableError" in done.stderr and "is not there" in done.stderr, done.stderr


def test_a_second_copy_of_the_library_is_one_warning_and_the_fallback(tmp_path):
    copy = tmp_path / library.LIBRARY.name
    shutil.copy(library.LIBRARY, copy)
    first = f"import torch\ntorch.ops.load_library({str(copy)!r})\n"
    done = run_python(first + FALLBACK.format(needed=f"the operators of fusedres_native are those of {copy}"))
    assert done.returncode == 0, done.stderr


def test_the_same_library_by_another_path_is_loaded(tmp_path):
    link = tmp_path / "link.so"
    link.symlink_to(library.LIBRARY)
    first = f"import ctypes, torch\nctypes.CDLL({str(link)!r})\n"
    done = run_python(first + "from fusedres.ops import dispatch\nassert 'native' in dispatch.LOADERS")
    assert done.returncode == 0, done.stderr


def test_a_library_of_other_sources_is_one_warning_and_the_fallback(monkeypatch):
    monkeypatch.setattr(library, "LIBRARY_OPS", (*library.LIBRARY_OPS, "op_of_tomorrow"))
    library.load.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="other sources, it lacks op_of_tomorrow") as caught:
            assert not library.is_usable()
        assert len(caught) == 1
    finally:
        library.load.cache_clear()


@pytest.mark.parametrize(
    "problem",
    [
        "it holds no GPU code",
        "it holds code for 90, needed sm_120",
        "its CUDA 13.0 says: CUDA driver version is insufficient for CUDA runtime version",
    ],
)
def test_a_gpu_that_the_library_does_not_serve_is_one_warning_and_the_fallback(ops, monkeypatch, problem):
    monkeypatch.setattr(ops, "cuda_device_problem", lambda index: problem if index else "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    served, other = torch.device("cuda", 0), torch.device("cuda", 1)
    reasons.device_reason.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=rf"does not run on cuda:1 \(a GPU\): {problem}") as caught:
            assert [reasons.device_reason(other) for _ in range(3)] == ["no_code_for_device"] * 3
            assert reasons.device_reason(served) is None
        assert len(caught) == 1
    finally:
        reasons.device_reason.cache_clear()


def test_the_library_says_which_gpus_it_serves(ops):
    """Here without a GPU: without GPU code, or without a driver, and never by crashing."""
    archs, problem = ops.cuda_archs(), ops.cuda_device_problem(99)
    assert bool(ops.cuda_version()) == bool(archs)
    assert re.match(r"its CUDA \d+\.\d+ says: " if archs else "it holds no GPU code$", problem)


def test_a_processor_without_avx2_has_no_native_backend():
    code = "from fusedres.ops import dispatch\nassert 'native' not in dispatch.LOADERS"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PATH": "/usr/bin", "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_archs_cover(ops):
    cover = ops.cuda_archs_cover
    assert cover("80;90", 8, 0) and cover("80;90", 8, 9) and cover("80;90", 9, 0)
    assert not cover("80;90", 7, 5) and not cover("80;90", 10, 0) and not cover("86", 8, 0)
    assert cover("80;90+PTX", 12, 0) and not cover("100+PTX", 9, 0) and not cover("", 9, 0)


def test_archs_cover_of_one_architecture_or_family(ops):
    cover = ops.cuda_archs_cover
    assert cover("100a", 10, 0) and not cover("100a", 10, 3) and not cover("103a", 10, 0)
    assert not cover("90a+PTX", 10, 0) and not cover("100a+PTX", 10, 3) and cover("100a;100", 10, 3)
    assert cover("100f", 10, 0) and cover("100f", 10, 3) and not cover("103f", 10, 0)
    assert not cover("100f", 11, 0) and not cover("100f+PTX", 12, 0) and cover("120f", 12, 1)
