"""Ahead-of-time compilation of every Triton kernel with every tile entry, and what each one takes.

    python tests/support/triton_resources.py          compile what the table lacks or whose source changed
    python tests/support/triton_resources.py --all    compile everything
Rows belong to the Triton that is imported; put another one first on PYTHONPATH to write its rows.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_entries import Entry, entries
from triton_sass import instructions, overwritten_operands, product_steps

from fusedres.triton_kernels.wgmma import waits_on

TABLE = Path(__file__).with_name("triton_resources.json")
BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"


def compile_entry(entry: Entry, architecture: int) -> dict[str, Any]:
    """Instructions, registers, shared memory, spilled bytes, and what the machine code of the products has to show."""
    names = entry.kernel.arg_names
    constants = {name: entry.constants.get(name) for name in names if name not in entry.signature}
    if "WAIT" in constants:
        constants["WAIT"] = waits_on(architecture // 10)
    aligned = [
        i for i, n in enumerate(names) if n in entry.signature and n not in entry.kernel.do_not_specialize
    ]
    source = ASTSource(
        fn=entry.kernel,
        signature={name: entry.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": entry.warps, "num_stages": entry.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    log, listing = assemble(ptx), disassemble(compiled.asm["cubin"])
    spills = [
        int(n) for pair in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) for n in pair
    ]
    return {
        "hash": entry.hash(),
        "instructions": instructions(listing),
        "steps": product_steps(listing),
        "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", log)),
        "shared": compiled.metadata.shared,
        "spills": sum(spills),
        "warnings": sorted(set(re.findall(r"C75\d\d", log))),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync.aligned") + ptx.count("tcgen05.mma"),
        "rounded_sums": rounded_sums(compiled.asm["ttgir"], *product_shape(entry)) if entry.product else 0,
        "async_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "overwritten_operands": len(overwritten_operands(listing)) if architecture == 90 else 0,
    }


def product_shape(entry: Entry) -> tuple[int, int]:
    """Rows and columns of the tile that a product's program makes."""
    columns = entry.constants["BN"]
    return entry.constants.get("BM", columns), columns


def rounded_sums(ttgir: str, rows: int, columns: int) -> int:
    """Tiles [rows, columns] of sums over a loop that are added outside of the product, where tensor cores truncate."""
    carried = set(re.findall(r"(%\w+) = ", " ".join(re.findall(r"iter_args\(([^)]*)\)", ttgir))))
    added = re.findall(rf"arith\.addf (%\w+), \S+ : tensor<{rows}x{columns}xf", ttgir)
    return sum(name in carried for name in added)


def assemble(ptx: str) -> str:
    """What ptxas -v says of this PTX; the newest architectures need its second binary."""
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        for binary in ("ptxas", "ptxas-blackwell"):
            command = [
                BINARIES / binary,
                "-v",
                f"--gpu-name={target[1]}",
                path,
                "-o",
                path.with_suffix(".cubin"),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout + done.stderr
    raise RuntimeError(f"ptxas: {done.stdout}{done.stderr}")


def disassemble(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [BINARIES / "nvdisasm", "-c", path], capture_output=True, text=True, check=True
        ).stdout


def read_table() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def main() -> None:
    table, changed = read_table(), 0
    rows = table.get(triton.__version__, {})
    kept = {}
    for entry in entries():
        for architecture in entry.architectures:
            key = f"{entry.id} sm_{architecture}"
            row = rows.get(key, {})
            if "--all" in sys.argv or row.get("hash") != entry.hash():
                row, changed = compile_entry(entry, architecture), changed + 1
                print(key, row, flush=True)
            kept[key] = row
    table = {**read_table(), triton.__version__: kept}  # another version may have been written meanwhile
    lines = [
        f"{json.dumps(version)}: {{\n"
        + ",\n".join(f"{json.dumps(k)}: {json.dumps(r)}" for k, r in kept.items())
        + "\n}"
        for version, kept in sorted(table.items())
    ]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"triton {triton.__version__}: {len(kept)} rows, {changed} compiled")


if __name__ == "__main__":
    main()
