"""Builds sdist and wheels, checks names and symbols, and uses them in a fresh environment that has torch alone.

python tests/support/check_package.py

Where nvcc is, a slim CUDA wheel too: it has to load and to compute with a torch that knows no CUDA.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from zipfile import ZipFile

import cuda_resources
import native_symbols
import torch

ROOT = Path(__file__).resolve().parents[2]
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
CUDA_WHEEL = """
import torch
from fusedres.ops import selftest
library = torch.ops.fusedres_native
assert library.cuda_archs() == "90", library.cuda_archs()
assert torch.cuda.is_available() or "says: CUDA driver" in library.cuda_device_problem(0)
served = [o for o in selftest.run() if o.backend == "native" and o.device == "cpu" and not o.unserved]
assert len(served) > 50 and not any(o.problem for o in served)
print("CUDA wheel works:", library.cuda_version(), library.cuda_device_problem(0))
"""
# torch's own wheels are manylinux_2_28
TAG = re.compile(r"-py3-none-manylinux_2_(\d+)_x86_64(\.manylinux_2_\d+_x86_64)*\.whl$")


def run(*command: object, **options: object) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def check_contents(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    foreign = [n for n in names if not n.startswith(("fusedres/", "fusedres-"))]
    assert not foreign, f"the wheel holds {foreign}: all of it belongs under fusedres/"
    assert "fusedres/py.typed" in names and "fusedres/triton_kernels/__init__.py" in names


def check_library(wheel: Path, folder: Path) -> Path | None:
    """The wheel's library, unpacked, if it has one: its symbols and the wheel's name have to keep one promise."""
    with ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(folder, libraries)
    if not libraries:
        assert wheel.name.endswith("-py3-none-any.whl"), wheel.name
        return None
    assert libraries == ["fusedres/libfusedres_native.so"] and wheel.name.endswith(
        "-py3-none-linux_x86_64.whl"
    )
    violations = native_symbols.violations(folder / libraries[0])
    assert not violations, "\n".join(violations)
    path = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    repair = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so"]
    run(*repair, "--wheel-dir", folder / "repaired", wheel, env=path)
    (repaired,) = (folder / "repaired").iterdir()
    tag = TAG.search(repaired.name)
    assert tag and int(tag[1]) <= 28, repaired.name
    print("manylinux:", repaired.name)
    return folder / libraries[0]


def check_cuda_wheel(out: Path, python: Path) -> None:
    """A slim wheel says what it holds, in its name and in its binary, and holds just that."""
    wanted = {**os.environ, "FUSEDRES_BUILD": "cuda", "FUSEDRES_CUDA_ARCHS": "90"}
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    run(*build, "--wheel-dir", out / "slim", ROOT, env=wanted)
    (wheel,) = (out / "slim").iterdir()
    assert re.search(r"-[\d.]+\+cu\d{3}\.sm90-py3-none-", wheel.name), wheel.name
    library = check_library(wheel, out / "unpacked-slim")
    assert library is not None
    command = [cuda_resources.toolkit_program("cuobjdump"), "--list-elf", str(library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"\.(sm_\w+)\.cubin", listed)) == {"sm_90"}, listed
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    run(python, "-c", CUDA_WHEEL, cwd=out)


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
        kept += ("networkx", "fsspec", "functorch", "numpy", "nvidia")
        if package.name.lower().startswith(kept) and not (site / package.name).exists():
            os.symlink(package, site / package.name)
    return python


def check_command(command: Path) -> None:
    """Without the library of the command line it works for `doctor`, and else says what to install, in one line."""
    run(command, "doctor", "--json", stdout=subprocess.DEVNULL)
    refused = subprocess.run([command, "explain", "fusedres:resnet18"], capture_output=True, text=True)
    assert refused.returncode == 1 and not refused.stdout, refused
    assert refused.stderr.count("\n") == 1 and "pip install 'fusedres[cli]'" in refused.stderr, refused.stderr
    print("without extras:", refused.stderr, end="")


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
        run(python, "-m", "fusedres", "doctor", cwd=out)
        check_command(python.with_name("fusedres"))
        check_library(wheel, out / "unpacked")
        if shutil.which("nvcc"):
            check_cuda_wheel(out, python)


if __name__ == "__main__":
    main()
