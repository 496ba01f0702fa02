"""Builds sdist and wheel, and imports the wheel in a fresh environment that has torch alone.

python tests/check_package.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from zipfile import ZipFile

import torch

ROOT = Path(__file__).resolve().parents[1]
TORCH_ALONE = """
import sys
import torch
import fusedres, fusedres.models
assert "triton_kernels" not in sys.modules
model = fusedres.patch(fusedres.models.cifar_resnet(20), recipe="separate")
model(torch.randn(2, 3, 16, 16)).sum().backward()
assert all(row.runs_as == "separate" for row in fusedres.report(model).blocks)
for extra in ("rich", "typer", "sklearn", "matplotlib", "pytest"):
    assert extra not in sys.modules
print("wheel works with torch alone:", fusedres.__version__, fusedres.__file__)
"""


def run(*command: object, **options: object) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def check_contents(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    foreign = [n for n in names if not n.startswith(("fusedres/", "fusedres-"))]
    assert not foreign, f"the wheel holds {foreign}: all of it belongs under fusedres/"
    assert "fusedres/py.typed" in names and "fusedres/triton_kernels/__init__.py" in names


def environment_with_torch_of_this_one(folder: Path) -> Path:
    """A fresh environment that sees this one's torch and what torch needs, and nothing else."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(
        subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout.strip()
    )
    for package in Path(torch.__file__).parents[1].iterdir():
        kept = ("torch", "typing_extensions", "sympy", "mpmath", "filelock", "jinja2", "markupsafe")
        kept += ("networkx", "fsspec", "functorch", "numpy", "nvidia", "setuptools", "pkg_resources")
        if package.name.lower().startswith(kept) and not (site / package.name).exists():
            os.symlink(package, site / package.name)
    return python


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out / "dist", ROOT)
        (wheel,) = (out / "dist").glob("*.whl")
        assert list((out / "dist").glob("*.tar.gz")), "no sdist was built"
        check_contents(wheel)
        python = environment_with_torch_of_this_one(out / "fresh")
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
        run(python, "-c", TORCH_ALONE, cwd=out)


if __name__ == "__main__":
    main()
