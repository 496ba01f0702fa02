"""What kernels do in machine code, as nvdisasm prints it: the length of a step, and Hopper's asynchronous products.

A product (HGMMA) reads the registers of its first operand, and changes those of its sums, until its warp group has
waited for it (WARPGROUP.DEPBAR). Groups end at instructions marked gsb0 and finish in order, so a wait that leaves N
groups in flight covers all but the N newest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
PRODUCT = re.compile(r"HGMMA\.64x(\d+)x\S* R(\d+), (?:R(\d+), )?gdesc")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)")
JUMP = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
TENSOR_CORES = re.compile(r"\b(?:H|HG|UTC[A-Z]*)MMA\b")
OPERAND_REGISTERS = 4  # of 16-bit [64, 16] among 128 threads


def overwritten_operands(listing: str) -> list[str]:
    """Each product with an instruction that some path reaches before its wait and that writes its registers."""
    code, labels = parse(listing)
    found = []
    for place, instruction in enumerate(code):
        product = PRODUCT.search(instruction)
        if product:
            columns, sums, operand = (int(group or -1) for group in product.groups())
            busy = registers(sums, columns // 2) | (
                registers(operand, OPERAND_REGISTERS) if operand >= 0 else set()
            )
            found += [
                f"{instruction} / {other}"
                for other in in_flight(code, labels, place)
                if written(other) & busy
            ]
    return found


def product_steps(listing: str) -> list[list[int]]:
    """Of each innermost loop with products of tensor cores, in order: instructions of one step, and products in it.

    A loop is what lies between a label and a jump back to it, unless the program ends between them: ptxas moves waits
    that are rarely entered behind the end. It unrolls a loop of few steps, which is not here then.
    """
    code, labels = parse(listing)
    jumps = ((JUMP.search(instruction), place) for place, instruction in enumerate(code))
    back = [(labels[jump[1]], place) for jump, place in jumps if jump and labels[jump[1]] <= place]
    loops = [
        (first, last)
        for first, last in back
        if products(code[first : last + 1]) and "EXIT" not in code[first : last + 1]
    ]
    around = {
        outer
        for outer in loops
        for first, last in loops
        if outer != (first, last) and outer[0] <= first and last <= outer[1]
    }
    inner = [code[first : last + 1] for first, last in loops if (first, last) not in around]
    return [[len(step), products(step)] for step in inner]


def products(code: list[str]) -> int:
    """Instructions of tensor cores."""
    return sum(TENSOR_CORES.search(instruction) is not None for instruction in code)


def instructions(listing: str) -> int:
    """All of a kernel's, without the padding behind its end."""
    return sum(not instruction.startswith("NOP") for instruction in parse(listing)[0])


def in_flight(code: list[str], labels: dict[str, int], place: int) -> Iterator[str]:
    """Instructions other than products that may run between the product at `place` and the wait that covers it."""
    ended = int("gsb0" in code[place])  # groups ended since, its own one among them
    todo, seen = [(place + 1, ended)], set()
    while todo:
        here, ended = todo.pop()
        if (here, ended) in seen or here >= len(code):
            continue
        seen.add((here, ended))
        instruction = code[here]
        wait, jump = WAIT.search(instruction), JUMP.search(instruction)
        if wait and ended > int(wait[1], 16):
            continue
        if "HGMMA" not in instruction:
            yield instruction
        elif "gsb0" in instruction:
            ended = min(ended + 1, 8)  # no wait leaves as many
        if jump:
            todo.append((labels[jump[1]], ended))
        conditional = instruction.startswith("@") or (jump and re.search(r"BRA\S* !?U?P\d", instruction))
        if conditional or not (jump or instruction.startswith("EXIT")):
            todo.append((here + 1, ended))


def parse(listing: str) -> tuple[list[str], dict[str, int]]:
    """The instructions, and the place of each label among them."""
    code: list[str] = []
    labels = {}
    for line in listing.splitlines():
        label, instruction = re.match(r"(\.L_\w+):", line), INSTRUCTION.search(line)
        if label:
            labels[label[1]] = len(code)
        elif instruction:
            code.append(instruction[1])
    return code, labels


def written(instruction: str) -> set[int]:
    """The general registers that an instruction writes: its first operand, after SHFL's and ATOM's predicate."""
    name, _, rest = re.sub(r"^@!?U?P\w+\s+", "", instruction).partition(" ")
    operands = [operand.strip() for operand in rest.split(",")]
    if name.startswith(("SHFL", "ATOM")) and not re.match(r"R\d", operands[0]):
        operands = operands[1:]
    register = re.match(r"R(\d+)", operands[0])
    if register is None:
        return set()
    if re.search(r"\.128|M88\.4|MT88\.4", name):
        width = 4
    else:
        width = 2 if re.search(r"\.64|WIDE|^[FI]2F\.F64|^D[A-Z]|M88\.2|MT88\.2|^CS2R$", name) else 1
    return registers(int(register[1]), width)


def registers(first: int, count: int) -> set[int]:
    return set(range(first, first + count))
