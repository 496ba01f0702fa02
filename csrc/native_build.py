"""How the native library is compiled: which parts this machine can build, and the commands, through ninja.

Used by setup.py. Imports nothing but the standard library.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import older_glibc

SOURCES = Path(__file__).resolve().parent
CPU_SOURCES = (
    "library.cpp",
    "older_systems.cpp",
    "cpu/bn.cpp",
    "cpu/bn_vectors.cpp",
    "cpu/cast.cpp",
    "cpu/conv1x1.cpp",
    "cpu/conv_weight.cpp",
    "cpu/grouped.cpp",
    "cpu/kernels.cpp",
    "cpu/kernels_avx2.cpp",
    "cpu/kernels_avx512.cpp",
    "cpu/kernels_avx512_bf16.cpp",
    "cpu/pool.cpp",
    "cpu/scratch.cpp",
    "cpu/winograd.cpp",
    "cpu/winograd_weight.cpp",
    "front/bn.cpp",
    "front/bn_merged.cpp",
    "front/cast.cpp",
    "front/conv.cpp",
    "front/conv3x3.cpp",
    "front/device_ops.cpp",
    "front/forms.cpp",
    "front/grouped.cpp",
    "front/places.cpp",
    "front/pool.cpp",
    "front/recording.cpp",
    "front/replay.cpp",
    "front/replay_python.cpp",
    "front/running_stats.cpp",
    "front/watch.cpp",
)
CUDA_FRONT = ("front/cuda.cpp", "front/products.cpp")
DEFAULT_ARCHS = "80;86;89;90;100;120"
NO_TORCH = "torch (install it first, then use --no-build-isolation)"
TORCH_FLOOR = "0x020a000000000000"  # 2.10
HIDDEN = ("-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
COMMON = ("-std=c++17", "-O3", *HIDDEN, "-Wall", "-Wextra")
# Functions begin at cache lines, or a change to one kernel would move the loops of the next, which cost some percent.
ALIGNED = ("-falign-functions=64",)
# the last two: false alarms inside GCC's own AVX-512 headers
AVX512 = (
    *ALIGNED,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
INSTRUCTION_SETS = {
    "cpu/kernels_avx2.cpp": (*ALIGNED, "-mavx2", "-mfma"),
    "cpu/kernels_avx512.cpp": AVX512,
    "cpu/kernels_avx512_bf16.cpp": (*AVX512, "-mavx512bf16"),
}


@dataclass(frozen=True)
class Plan:
    """What to build. `reason` says why something was left out, "" if nothing was."""

    native: bool = False
    cuda: bool = False
    archs: tuple[str, ...] = ()
    slim: bool = False
    reason: str = ""


def plan(build: str, archs: str | None) -> Plan:
    """The plan for FUSEDRES_BUILD and FUSEDRES_CUDA_ARCHS; SystemExit where it cannot be met."""
    if build not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"fusedres: FUSEDRES_BUILD is {build!r}, needed auto, cpu, cuda or none.")
    if build == "none":
        return Plan(reason="pure package: FUSEDRES_BUILD=none")
    missing = missing_for_cpu()
    if missing:
        if build != "auto":
            raise SystemExit(f"fusedres: FUSEDRES_BUILD={build} needs {missing}.")
        return Plan(reason=f"pure package (reference and Triton backends): {missing} not found")
    missing = missing_for_cuda()
    if build == "cuda" and missing:
        raise SystemExit(f"fusedres: FUSEDRES_BUILD=cuda needs {missing}.")
    if build == "cpu":
        return Plan(native=True)
    if build == "auto" and (why := against_cuda(missing)):
        return Plan(
            native=True, reason=f"no CUDA kernels: {why}; FUSEDRES_BUILD=cuda builds them all the same"
        )
    if build == "auto" and not archs:  # six architectures take minutes: those of this machine serve it
        archs = ";".join(gpu_archs())
    chosen = tuple(re.split(r"[;, ]+", (archs or DEFAULT_ARCHS).strip()))
    if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in chosen):
        raise SystemExit(f"fusedres: FUSEDRES_CUDA_ARCHS is {archs!r}, needed numbers such as '80;90'.")
    return Plan(native=True, cuda=True, archs=chosen, slim=bool(archs))


def against_cuda(missing: str) -> str:
    """Why CUDA kernels are not built unasked, "" where they are. missing: what they cannot be built without."""
    if missing:
        return f"{missing} not found"
    if not gpu_archs():
        return "no GPU found"
    return "" if torch_has_cuda() else "torch is a CPU build"


def missing_for_cpu() -> str:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "Linux on x86-64"
    if shutil.which(compiler()) is None:
        return f"a C++ compiler ({compiler()})"
    return "" if torch_folder() else NO_TORCH


def missing_for_cuda() -> str:
    if not cuda_sources():
        return "csrc/cuda"
    return "" if nvcc() else "nvcc"


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home) / "bin/nvcc")) if home else shutil.which("nvcc")


def cuda_home() -> Path:
    """The toolkit's folder; nvcc may be a link or a wrapper, so it is asked."""
    found = subprocess.run([nvcc(), "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False)
    return Path(re.search(r"TOP=(.*)", found.stderr).group(1).strip()).resolve()


def cuda_version() -> str:
    """Such as "130"."""
    found = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True)
    return "".join(re.search(r"release (\d+)\.(\d+)", found.stdout).groups())


def arch_names(plan: Plan) -> str:
    """What the binary says of itself: "80;90" for a slim one, "80;...;120+PTX" for the default."""
    return ";".join(plan.archs) + ("" if plan.slim else "+PTX")


def local_version(plan: Plan) -> str:
    """ "+cu130.sm90" for a slim build, "" otherwise."""
    return f"+cu{cuda_version()}." + ".".join(f"sm{arch}" for arch in plan.archs) if plan.slim else ""


def nvcc_archs(plan: Plan) -> list[str]:
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in plan.archs]
    newest = plan.archs[-1]
    return flags if plan.slim else [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def cuda_sources() -> tuple[str, ...]:
    files = [p for suffix in ("*.cu", "*.cpp") for p in (SOURCES / "cuda").glob(suffix)]
    return tuple(sorted(str(p.relative_to(SOURCES)) for p in files))


def gpu_archs() -> list[str]:
    """Compute capabilities of this machine's GPUs, such as ["80", "90"]."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return sorted(
        {f"{major}{minor}" for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", found, re.MULTILINE)}
    )


@cache
def torch_folder() -> Path | None:
    """The torch to build against, 2.10 or newer: this process's, else that of the environment installed into."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        return Path(spec.origin).parent
    return next((folder / "torch" for folder in site_packages() if is_recent(folder / "torch")), None)


def site_packages() -> list[Path]:
    """Where the environment that is installed into has its packages: pip hides them from a build, but runs it with
    that environment's Python; other front ends leave its name, or have it beside the sources."""
    named = (os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX"))
    prefixes = [Path(name) for name in named if name] + [SOURCES.parent / ".venv"]
    own = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]
    return [
        *own,
        *(folder for prefix in prefixes for folder in sorted(prefix.glob("lib/python3*/site-packages"))),
    ]


def is_recent(torch: Path) -> bool:
    """Whether a torch of at least 2.10 is there."""
    file = torch / "version.py"
    found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", file.read_text()) if file.is_file() else None
    return found is not None and (int(found[1]), int(found[2])) >= (2, 10)


def requirements() -> list[str]:
    """What an isolated build needs besides setuptools: torch, where it is all that is missing."""
    wanted = os.environ.get("FUSEDRES_BUILD", "auto") != "none"
    return ["torch>=2.10"] if wanted and torch_folder() is None and missing_for_cpu() == NO_TORCH else []


def torch_has_cuda() -> bool:
    version = (torch_folder() / "version.py").read_text()
    return re.search(r"^cuda\b.*= *['\"]", version, re.MULTILINE) is not None


def compile_command(plan: Plan, source: str, target: Path) -> list[str]:
    files = ["-c", str(SOURCES / source), "-o", str(target)]
    if source.endswith(".cu"):
        return [nvcc(), "-std=c++17", "-O3", *nvcc_archs(plan), "-Xcompiler", ",".join(HIDDEN), *files]
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}"]
    includes = ["-isystem", str(torch_folder() / "include")]
    if plan.cuda:
        defines += ["-DUSE_CUDA", f'-DFUSEDRES_CUDA_ARCHS="{arch_names(plan)}"']
        includes += ["-isystem", str(cuda_home() / "include")]
    flags = INSTRUCTION_SETS.get(source, ())
    return [compiler(), *COMMON, *flags, *includes, *defines, *files]


def link_command(plan: Plan, objects: list[Path], target: Path, folder: Path) -> list[str]:
    libraries = [
        "-L",
        str(torch_folder() / "lib"),
        "-Wl,--no-as-needed",
        "-ltorch_cpu",
        "-Wl,--exclude-libs,ALL",
    ]
    if plan.cuda:
        libraries += ["-L", str(cuda_home() / "lib64"), "-lcudart_static"]
    older = older_glibc.stand_ins(compiler(), folder / "older_glibc", plan.cuda)
    return [compiler(), "-shared", *map(str, objects), *libraries, *older, "-o", str(target)]


def build(plan: Plan, folder: Path, target: Path) -> None:
    """Compiles what `plan` names in `folder` and links it to `target`."""
    folder, target = folder.resolve(), target.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    sources = (*CPU_SOURCES, *CUDA_FRONT, *cuda_sources()) if plan.cuda else CPU_SOURCES
    objects = {folder / (source.replace("/", "_") + ".o"): source for source in sources}
    compiles = {o: compile_command(plan, source, o) for o, source in objects.items()}
    link = link_command(plan, list(objects), target, folder)
    ninja = shutil.which("ninja")
    if ninja is None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for source, _ in zip(objects.values(), pool.map(run, compiles.values()), strict=True):
                print(f"fusedres: compile {source}", flush=True)
        subprocess.run(link, check=True)
        return
    (folder / "build.ninja").write_text(ninja_file(compiles, objects, link, target))
    subprocess.run([ninja, "-C", str(folder)], check=True)


def run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def escaped(path: object) -> str:
    """A path in a build statement."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def shell(command: list[str]) -> str:
    return " ".join("'" + part.replace("'", "'\\''") + "'" for part in command).replace("$", "$$")


def ninja_file(
    compiles: dict[Path, list[str]], sources: dict[Path, str], link: list[str], target: Path
) -> str:
    lines = ["rule run", "  command = $line", "rule compile", "  command = $line -MMD -MF $out.d"]
    lines += ["  depfile = $out.d", "  deps = gcc", "  description = fusedres: compile $source"]
    for output, command in compiles.items():
        lines += [f"build {escaped(output)}: compile {escaped(SOURCES / sources[output])}"]
        lines += [f"  line = {shell(command)}", f"  source = {sources[output]}"]
    lines += [f"build {escaped(target)}: run {' '.join(map(escaped, compiles))}", f"  line = {shell(link)}"]
    return "\n".join(lines) + "\n"
