"""Builds the native library with its AVX-512 kernels in use on any processor that has AVX2: SIMDe emulates them.

The same sources, launchers and front as in the wheel; only the vectors of cpu/vec_avx512.h are emulated, and
cpu/kernels.cpp finds every instruction set. `package` puts the library into a copy of the package.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import simde_py

import fusedres

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "avx512_emulation"


def native_build() -> ModuleType:
    """csrc/native_build.py, with other flags for the two files."""
    spec = importlib.util.spec_from_file_location(
        "native_build_for_avx512", ROOT / "csrc" / "native_build.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    emulation = ROOT / "tests" / "support" / "avx512_emulation"
    emulated = (
        "-O1",
        "-mavx2",
        "-mfma",
        "-Wno-psabi",
        "-I",
        str(emulation),
        "-isystem",
        simde_py.get_include(),
    )
    module.INSTRUCTION_SETS = {
        **module.INSTRUCTION_SETS,
        # all but those of kernels_avx512_bf16.cpp, which stay real
        "cpu/kernels.cpp": ('-D__builtin_cpu_supports(f)=(__builtin_strcmp(f, "avx512bf16") != 0)',),
        "cpu/kernels_avx512.cpp": emulated,
    }
    module.COMMON = ("-std=c++17", "-O0", "-Werror", *module.HIDDEN, "-Wall", "-Wextra")
    return module


def package() -> Path:
    """A folder for PYTHONPATH, which holds the package with this library."""
    site, source = BUILD / "site", Path(fusedres.__file__).parent
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(source, site / "fusedres", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    build = native_build()
    library = BUILD / "libfusedres_native.so"
    build.build(build.Plan(native=True), BUILD, library)
    shutil.copy(library, site / "fusedres")
    return site
