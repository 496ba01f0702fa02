"""Build entry: metadata is in pyproject.toml; this adds the compiled library, from csrc/, where it can be.

    FUSEDRES_BUILD       auto (default): what this machine can build, else a pure package and a line that says
                         why; cpu or cuda: that, or an error; none: a pure package
    FUSEDRES_CUDA_ARCHS  such as "80;90": the GPUs to hold code for, in a wheel of version +cuXYZ.sm80.sm90

torch is found, never imported: its headers and libraries are all that a build needs.
"""

import os
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import native_build  # noqa: E402

PLAN = native_build.plan(os.environ.get("FUSEDRES_BUILD", "auto"), os.environ.get("FUSEDRES_CUDA_ARCHS"))


class BuildNative(build_ext):
    """Puts `libfusedres_native.so`, which has no Python symbols, where the extension module would go."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        native_build.build(PLAN, Path(self.build_temp), Path(self.get_ext_fullpath(ext.name)))


class BuildPackage(build_py):
    """Puts into a package without kernels why it has none: `fusedres.ops.native.library` says it to the user."""

    def run(self) -> None:
        super().run()
        if not (PLAN.native or self.editable_mode):
            (Path(self.build_lib) / "fusedres" / "without_kernels.txt").write_text(PLAN.reason)


class AnyPythonWheel(bdist_wheel):
    """Tag py3-none-<platform>: the library uses torch's stable ABI and nothing of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform if PLAN.native else "any"


class NativeDistribution(Distribution):
    def parse_config_files(self, *args: object, **kwargs: object) -> None:
        super().parse_config_files(*args, **kwargs)
        self.metadata.version += native_build.local_version(PLAN)

    def has_ext_modules(self) -> bool:
        return PLAN.native


if PLAN.reason:
    print(f"fusedres: {PLAN.reason}", file=sys.stderr)

setup(
    distclass=NativeDistribution,
    ext_modules=[Extension("fusedres.libfusedres_native", sources=[])] if PLAN.native else [],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
