"""What setup.py decides to build, from the environment and from what the machine has."""

import importlib.util
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "native_build.py"


def load(monkeypatch):
    spec = importlib.util.spec_from_file_location("native_build", SOURCE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "native_build", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(monkeypatch):
    """The build module on a machine that has everything."""
    module = load(monkeypatch)
    for name in ("missing_for_cpu", "missing_for_cuda"):
        monkeypatch.setattr(module, name, lambda: "")
    monkeypatch.setattr(module, "torch_has_cuda", lambda: True)
    monkeypatch.setattr(module, "gpu_archs", lambda: ["80", "90"])
    monkeypatch.setattr(module, "cuda_version", lambda: "130")
    return module


def test_auto_builds_for_the_gpus_that_are_here(build):
    plan = build.plan("auto", None)
    assert plan.native and plan.cuda and plan.slim and not plan.reason and plan.archs == ("80", "90")


def test_auto_builds_no_code_for_gpus_on_a_machine_without(build, monkeypatch):
    monkeypatch.setattr(build, "gpu_archs", list)
    plan = build.plan("auto", None)
    assert plan.native and not plan.cuda and "no GPU found; FUSEDRES_BUILD=cuda" in plan.reason


@pytest.mark.parametrize(
    ("said", "archs"), [("9.0\n8.0\n9.0\n", ["80", "90"]), ("NVIDIA-SMI has failed\n", [])]
)
def test_the_gpus_that_the_driver_names(monkeypatch, tmp_path, said, archs):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert load(monkeypatch).gpu_archs() == archs


def test_cuda_builds_for_every_supported_gpu(build):
    plan = build.plan("cuda", None)
    assert plan.native and plan.cuda and not plan.slim and not plan.reason
    assert build.arch_names(plan) == "80;86;89;90;100;120+PTX" and build.local_version(plan) == ""
    assert build.nvcc_archs(plan)[-1] == "-gencode=arch=compute_120,code=compute_120"


def test_slim(build):
    plan = build.plan("auto", "80;90")
    assert plan.slim and build.arch_names(plan) == "80;90" and build.local_version(plan) == "+cu130.sm80.sm90"
    assert all("code=sm_" in flag for flag in build.nvcc_archs(plan))
    assert build.plan("auto", "90a;100f").archs == ("90a", "100f")


def test_auto_without_a_compiler_is_pure_and_says_why(build, monkeypatch):
    monkeypatch.setattr(build, "missing_for_cpu", lambda: "a C++ compiler (g++)")
    plan = build.plan("auto", None)
    assert not plan.native and "a C++ compiler (g++) not found" in plan.reason
    for wanted in ("cpu", "cuda"):
        with pytest.raises(SystemExit, match=rf"FUSEDRES_BUILD={wanted} needs a C\+\+ compiler"):
            build.plan(wanted, None)


def test_auto_without_nvcc_or_with_a_cpu_torch_has_no_cuda(build, monkeypatch):
    monkeypatch.setattr(build, "torch_has_cuda", lambda: False)
    plan = build.plan("auto", None)
    assert plan.native and not plan.cuda and "torch is a CPU build" in plan.reason
    assert build.plan("cuda", None).cuda
    monkeypatch.setattr(build, "missing_for_cuda", lambda: "nvcc")
    assert "nvcc not found" in build.plan("auto", None).reason
    with pytest.raises(SystemExit, match="FUSEDRES_BUILD=cuda needs nvcc"):
        build.plan("cuda", None)


def test_none_and_unknown_values(build):
    assert not build.plan("none", None).native
    with pytest.raises(SystemExit, match="needed auto, cpu, cuda or none"):
        build.plan("gpu", None)
    with pytest.raises(SystemExit, match="needed numbers such as"):
        build.plan("cuda", "hopper")


def test_ninja_file_of_a_path_with_spaces(build, tmp_path):
    folder = tmp_path / "with space"
    target = folder / "x.o"
    text = build.ninja_file({target: ["g++", "it's"]}, {target: "library.cpp"}, ["ld"], folder / "lib.so")
    assert f"build {str(target).replace(' ', '$ ')}: compile" in text and "'it'\\''s'" in text


def test_sources_use_no_macro_that_the_oldest_torch_lacks():
    """The binary runs on torch 2.10 whatever it was built with; a source build there needs its headers' names alone."""
    newer = re.compile(r"\bSTABLE_TORCH_ERROR_CODE_CHECK\b")  # of torch 2.13
    sources = [path for path in SOURCE.parent.rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    assert len(sources) > 20
    assert not [path.name for path in sources if newer.search(path.read_text())]


@pytest.fixture
def hidden(monkeypatch, tmp_path):
    """The build module where an isolated build hides torch; the environment that it installs into is tmp_path."""
    module = load(monkeypatch)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda kind: str(tmp_path / "none"))
    monkeypatch.setattr(module, "SOURCES", tmp_path / "sources" / "csrc")
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "FUSEDRES_BUILD"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.mark.parametrize(
    ("version", "serves"), [("2.10.0", True), ("2.13.0+cpu", True), ("3.0", True), ("2.9.1", False)]
)
def test_an_isolated_build_takes_the_torch_that_is_installed(hidden, monkeypatch, tmp_path, version, serves):
    torch = tmp_path / "lib" / "python3.12" / "site-packages" / "torch"
    torch.mkdir(parents=True)
    (torch / "version.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    assert hidden.torch_folder() == (torch if serves else None)
    assert hidden.requirements() == ([] if serves else ["torch>=2.10"])


def test_an_isolated_build_asks_for_torch_only_where_it_can_use_it(hidden, monkeypatch):
    assert hidden.requirements() == ["torch>=2.10"]
    monkeypatch.setenv("FUSEDRES_BUILD", "none")
    assert hidden.requirements() == []
    monkeypatch.delenv("FUSEDRES_BUILD")
    monkeypatch.setattr(hidden.shutil, "which", lambda name: None)
    assert hidden.requirements() == []
