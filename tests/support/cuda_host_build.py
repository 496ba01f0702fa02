"""Builds csrc/cuda for the host: the emulator instead of CUDA, a Python module instead of torch's registry.

A build is kept in build/cuda_host/<variant> and redone by ninja where a source changed. Variants: plain, and
the two sanitizers, whose modules load only into a Python that preloads the sanitizer (`environment`).
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("cuda_host_binding.cpp")
BUILDS = ROOT / "build" / "cuda_host"
MODULE = "fusedres_cuda_host"
FLAGS = {
    "plain": "-O1",
    "address": "-O1 -g1 -fsanitize=address,undefined -fno-sanitize=null,vptr,object-size"
    " -fno-sanitize-recover=undefined",
    "thread": "-O1 -g1 -fsanitize=thread",
}
PRELOAD = {"plain": (), "address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
WARNINGS = "-Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-maybe-uninitialized"
SCRIPT = """\
rule compile
  command = g++ -std=c++17 -MMD -MF $out.d {warnings} {flags} -ffp-contract=off -fPIC -fvisibility=hidden \
{includes} -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = g++ -shared {flags} $in -o $out
"""


def cuda_include() -> Path | None:
    """The folder of cuda_bf16.h and its like, of a toolkit or of NVIDIA's packages; None: none here."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    homes += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    candidates = [Path(home) / "include" for home in homes if home]
    candidates += [Path(p) / "nvidia" / "cu13" / "include" for p in sys.path]
    return next((c for c in candidates if (c / "cuda_bf16.h").exists()), None)


def build(
    variant: str,
    sources: Path = ROOT / "csrc",
    name: str | None = None,
    only: Collection[str] = (),
    others: Mapping[str, Path] | None = None,
) -> Path:
    """The module's path.

    Args:
        variant: a key of FLAGS.
        sources: a folder like csrc/.
        name: of the build folder, the variant's by default.
        only: the sources to compile, by their names without a suffix; all by default.
        others: what is linked for the sources that are not compiled, see `objects`.
    """
    units = [*sorted((sources / "cuda").glob("*.cu")), sources / "host_emulator" / "runtime.cpp"]
    here = [u for u in units if not only or u.stem in only]
    lines = [f"build {u.stem}.o: compile {escape(u)}" for u in here]
    # first come, first linked: templates of what is compiled win over those of the other objects
    linked = [f"{u.stem}.o" for u in here]
    linked += [escape((others or {})[u.stem]) for u in units if u not in here]
    lines.append(f"build {MODULE}.so: link {' '.join(linked)} {escape(build_binding())}")
    folder = BUILDS / (name or variant)
    run_ninja(folder, FLAGS[variant], lines)
    return folder / f"{MODULE}.so"


def build_some(variant: str, ops: Collection[str]) -> Path:
    """The module with these ops alone in this variant, for a third of a whole build's time or less.

    The other ops are of the plain build, and no part of what such a module is asked.
    """
    build("plain")
    return build(variant, name=some(variant), only=(*ops, "launch", "runtime"), others=objects("plain"))


def some(variant: str) -> str:
    """The build folder of `build_some`."""
    return f"{variant}_some"


def objects(name: str) -> dict[str, Path]:
    """The object files in a build folder, by the names of their sources."""
    return {path.stem: path for path in (BUILDS / name).glob("*.o")}


def build_binding() -> Path:
    """The binding's object file, the same for all variants."""
    run_ninja(
        BUILDS,
        "-O0",
        [f"build binding.o: compile {escape(SOURCE)}"],
    )
    return BUILDS / "binding.o"


def run_ninja(folder: Path, flags: str, lines: list[str]) -> None:
    include = cuda_include()
    assert include is not None, "no CUDA headers"
    paths = (pybind11.get_include(), sysconfig.get_path("include"), include)
    includes = " ".join(f"-isystem '{p}'" for p in paths)
    text = SCRIPT.format(warnings=WARNINGS, flags=flags, includes=includes) + "\n".join(lines) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "build.ninja"
    command = ["ninja", "--quiet", "-j", str(os.cpu_count()), "-C", str(folder)]
    with (folder / "lock").open("w") as lock:  # of processes that test side by side, one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not script.exists() or script.read_text() != text:
            script.write_text(text)
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"host build {folder} failed:\n{done.stdout}{done.stderr}"


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(variant: str) -> dict[str, str]:
    """For a Python that loads a module of this variant."""
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={lib}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for lib in PRELOAD[variant]
    ]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "TSAN_OPTIONS": "halt_on_error=1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
