"""What nvcc makes of each CUDA kernel: registers, shared memory, spills, and what its machine code has.

python tests/support/cuda_resources.py        rewrites cuda_resources.csv, which CI compares with a fresh build
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cuda_main_loop import Code, main_loop

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "cuda_resources"
TABLE = Path(__file__).with_suffix(".csv")
ARCHITECTURES = ("80", "90", "100")
SCRIPT = """\
rule compile
  command = nvcc -std=c++17 -O3 -arch=sm_$arch -cubin -Xptxas -v -MD -MF $out.d -o $out $in \
> $out.log 2>&1 || (cat $out.log; false)
  depfile = $out.d
  deps = gcc
"""


class Kernel(NamedTuple):
    arch: str
    name: str  # with its template arguments
    registers: int
    shared_bytes: int
    spill_bytes: int  # stores and loads
    loads_of_16_bytes: int  # LDG.E.128 instructions
    products: int  # HMMA instructions: of 16 x 8 x 16, by tensor cores
    loop_instructions: int  # of the main loop, as `cuda_main_loop` has it
    loop_products: int


def nvcc_release() -> str | None:
    if shutil.which("nvcc") is None:
        return None
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match.group(1) if match else None


def compile_all() -> list[Path]:
    """A cubin for each source and architecture; only what changed is compiled."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    lines, cubins = [], []
    for arch in ARCHITECTURES:
        for source in sources:
            cubins.append(BUILD / f"{source.stem}.{arch}.cubin")
            path = str(source).replace("$", "$$").replace(" ", "$ ")
            lines += [f"build {cubins[-1].name}: compile {path}", f"  arch = {arch}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text(SCRIPT + "\n".join(lines) + "\n")
    command = ["ninja", "--quiet", "-j", str(os.cpu_count()), "-C", str(BUILD)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"nvcc failed:\n{done.stdout}{done.stderr}"
    return cubins


def instructions(cubin: bytes) -> dict[str, Code]:
    """Of each kernel, by mangled name."""
    header_offset, header_size, count, names = struct.unpack_from("<Q10xHHH", cubin, 40)
    headers = [struct.unpack_from("<II16xQQ", cubin, header_offset + i * header_size) for i in range(count)]
    strings = headers[names][2]
    found = {}
    for name_offset, _, offset, size in headers:
        end = cubin.index(b"\0", strings + name_offset)
        name = cubin[strings + name_offset : end].decode()
        if name.startswith(".text."):
            found[name[6:]] = list(struct.iter_unpack("<QQ", cubin[offset : offset + size]))
    return found


# by what they count: the instruction as the disassembler writes it, and its test; the opcode is in bits 0-11
COUNTED: dict[str, tuple[str, Callable[[int, int], bool]]] = {
    # access size in bits 73-75, 6: 16 bytes
    "loads_of_16_bytes": (
        r"\bLDG\.E\S*\.128\b",
        lambda low, high: low & 0xFFF == 0x981 and high >> 9 & 7 == 6,
    ),
    "products": (r"\bHMMA\.16816\b", lambda low, high: low & 0xFFF == 0x23C),
}


def counts(cubin: bytes) -> dict[str, dict[str, int]]:
    """By mangled name, how many instructions of each kind of COUNTED a kernel has."""
    return {
        name: {what: sum(test(*i) for i in code) for what, (_, test) in COUNTED.items()}
        for name, code in instructions(cubin).items()
    }


def toolkit_program(name: str) -> str:
    """The path of nvdisasm or cuobjdump: the toolkit's, or the one that Triton ships."""
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None
    shipped = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    return shutil.which(name) or str(shipped)


def disassembled_counts(cubin: Path) -> dict[str, dict[str, int]]:
    """`counts` by NVIDIA's disassembler."""
    command = [toolkit_program("nvdisasm"), "--print-code", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)[1:]
    return {
        name: {what: len(re.findall(pattern, body)) for what, (pattern, _) in COUNTED.items()}
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def readable(mangled: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    short = [re.sub(r"^void |fusedres::cuda::", "", name) for name in done.stdout.splitlines()]
    enums = [re.sub(r"\((\w+)\)(\d+)", r"\1 \2", name) for name in short]  # "(Gate)1" -> "Gate 1"
    return [name.split("(")[0] for name in enums]


def measure() -> list[Kernel]:
    kernels = []
    for cubin in compile_all():
        arch, log = cubin.suffixes[0][1:], Path(f"{cubin}.log").read_text()
        counted = counts(cubin.read_bytes())
        code = instructions(cubin.read_bytes())
        parts = re.split(r"Function properties for (\S+)", log)[1:]
        names = readable(parts[::2])
        for mangled, name, text in zip(parts[::2], names, parts[1::2], strict=True):
            spills = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
            registers, *_ = map(int, re.findall(r"Used (\d+) registers", text))
            shared = sum(map(int, re.findall(r"(\d+) bytes smem", text)))
            loop = main_loop(code[mangled], int(arch))
            kernels.append(Kernel(arch, name, registers, shared, spills, *counted[mangled].values(), *loop))
    return sorted(kernels)


def read_table() -> tuple[str, list[Kernel]]:
    """nvcc's release when the table was written, and its rows."""
    with TABLE.open(newline="") as file:
        release, _, *rows = csv.reader(file)
    return release[1], [Kernel(r[0], r[1], *map(int, r[2:])) for r in rows]


def write_table() -> None:
    with TABLE.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["nvcc", nvcc_release()])
        out.writerow(Kernel._fields)
        out.writerows(measure())


if __name__ == "__main__":
    write_table()
