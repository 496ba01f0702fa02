"""The CPU launchers under ThreadSanitizer: python tests/support/thread_sanitizer/run.py; exit code 0 without a race."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "thread_sanitizer"
sys.path.insert(0, str(ROOT / "csrc"))

import native_build  # noqa: E402

FLAGS = ("-std=c++17", "-O1", "-g", "-w", "-fsanitize=thread", f"-I{HERE}")


def main() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    compiler, objects = native_build.compiler(), []
    sources = [s for s in native_build.CPU_SOURCES if s.startswith("cpu/")]
    for source in sources:
        objects.append(str(BUILD / f"{Path(source).stem}.o"))
        own = native_build.INSTRUCTION_SETS.get(source, ())
        file = str(native_build.SOURCES / source)
        subprocess.run([compiler, *FLAGS, *own, "-c", file, "-o", objects[-1]], check=True)
    program = str(BUILD / "run")
    subprocess.run([compiler, *FLAGS, str(HERE / "main.cpp"), *objects, "-o", program], check=True)
    # without random addresses: the sanitizer's own memory lies where a newer kernel puts the program's
    done = subprocess.run(["setarch", "-R", program], env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"})
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
