"""The main loop of a product in machine code: the innermost loop with products, and how many instructions it has.

A loop goes from the instruction that is jumped back to, to the last one that jumps there. Loops inside that have no
product, as over the elements of a chunk, count once.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

Code = list[tuple[int, int]]  # an instruction has 128 bits, the low and the high half
JUMPS = (0x947, 0x547)  # BRA; the opcode is in bits 0-11
PRODUCT = 0x23C  # HMMA


def jump(low: int, high: int, arch: int) -> int:
    """How many instructions a jump goes forward, from the one behind it; below 0: back.

    The distance is in words of 4 bytes, signed, in bits 34-81; from sm_90 on those are its upper bits, and bits 16-23
    are its lower ones.
    """
    distance = (low | high << 64) >> 34 & (1 << 48) - 1
    distance -= (distance >> 47) << 48
    if arch >= 90:
        distance = distance << 8 | low >> 16 & 0xFF
    return distance // 4


def loops(jumps: Iterable[tuple[int, int]]) -> dict[int, int]:
    """By its first instruction, the last of each loop, from jumps (from, to)."""
    found: dict[int, int] = {}
    for source, target in jumps:
        if target <= source:
            found[target] = max(source, found.get(target, 0))
    return found


def jumps_of(code: Code, arch: int) -> list[tuple[int, int]]:
    return [(i, i + 1 + jump(low, high, arch)) for i, (low, high) in enumerate(code) if low & 0xFFF in JUMPS]


def main_loop(code: Code, arch: int) -> tuple[int, int]:
    """(instructions, products) of the main loop; zeros where no loop has a product."""
    products = [i for i, (low, _) in enumerate(code) if low & 0xFFF == PRODUCT]
    inside = [
        (last + 1 - first, sum(first <= i <= last for i in products))
        for first, last in loops(jumps_of(code, arch)).items()
    ]
    return min((loop for loop in inside if loop[1]), default=(0, 0))


def disassembled_jumps(disassembler: str, cubin: Path) -> dict[str, list[tuple[int, int]]]:
    """`jumps_of` each kernel, by mangled name, as NVIDIA's disassembler has them; those to labels alone."""
    command = [disassembler, "--print-code", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)[1:]
    found = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        labels: dict[str, int] = {}
        jumps: list[tuple[int, str]] = []
        waiting: list[str] = []
        for line in body.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                waiting.append(label[1])
            elif instruction := re.search(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
                at = int(instruction[1], 16) // 16
                labels |= dict.fromkeys(waiting, at)
                waiting = []
                if to := re.search(r"\bBRA\b.*(\.L_x_\d+)", instruction[2]):
                    jumps.append((at, to[1]))
        found[name] = [(at, labels[to]) for at, to in jumps]
    return found
