"""Runs the op tests with one wheel file under another Python and another torch: one binary, many hosts.

    python tests/abi/run.py dist/fusedres-*.whl --python python3.12 --torch 2.15.0

Makes an environment of its own with that Python and torch (the registry's build, with its CUDA libraries),
installs the wheel without dependencies, and runs the native backend's tests from a copy of `tests/`, so that
nothing of the checkout can be imported in its place.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
SUITES = (
    "native/test_native_ops.py",
    "native/test_native_convolutions.py",
    "native/test_native_statistics.py",
    "native/test_native_library.py",
)


def run(*command: object) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True)


def environment(folder: Path, python: str, torch: str) -> Path:
    """The interpreter of a fresh or kept environment with this torch."""
    interpreter = folder / "bin" / "python"
    if not interpreter.is_file():
        run(python, "-m", "venv", folder)
    run(interpreter, "-m", "pip", "install", "--quiet", f"torch=={torch}", "numpy", "pytest>=8")
    return interpreter


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", required=True, help="an interpreter, such as python3.12")
    parser.add_argument("--torch", required=True, help="an exact version, such as 2.15.0")
    parser.add_argument("--folder", type=Path, default=Path("build/abi"))
    args = parser.parse_args()

    name = f"{Path(args.python).name}-torch{args.torch}"
    folder = args.folder.resolve() / name
    interpreter = environment(folder / "venv", args.python, args.torch)
    run(interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", args.wheel)
    tests = folder / "tests"
    shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(TESTS, tests, ignore=shutil.ignore_patterns("__pycache__"))
    helpers = {**os.environ, "PYTHONPATH": os.pathsep.join(str(tests / name) for name in ("support", "zoo"))}
    about = "import sys, torch, fusedres; print(sys.version, torch.__version__, fusedres.__file__)"
    run(interpreter, "-P" if "3.10" not in args.python else "-I", "-c", about)
    suites = [tests / suite for suite in SUITES]
    command = [interpreter, "-m", "pytest", "-q", "-x", "--rootdir", tests, *suites]
    done = subprocess.run(command, cwd=tests, env=helpers)
    print(f"{args.wheel.name} with {name}: {'passed' if done.returncode == 0 else 'FAILED'}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
