"""What a build of the native library needs from outside and shows to it, held against the promise of its wheel tag."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

SYSTEM = {
    *("libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"),
    *("libdl.so.2", "librt.so.1", "libpthread.so.0"),
}
# fusedres/ops/native/from_python.py asks for them
FOR_PYTHON = {
    "fusedres_watch_reader",
    "fusedres_replay_function",
    "fusedres_replay_block_function",
    "fusedres_bundle_drop_function",
}
STABLE = re.compile(r"^(aoti_torch_|torch_)\w+$")  # torch's C ABI
# the newest of glibc and libstdc++ on the oldest system that torch >= 2.10 is built for, manylinux_2_28
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def readelf(library: Path, *arguments: str) -> str:
    command = ["readelf", *arguments, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def needed_libraries(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", readelf(library, "-d")))


def symbols(library: Path, undefined: bool) -> set[str]:
    """Names of the dynamic symbols, with versions."""
    rows = [line.split() for line in readelf(library, "--dyn-syms", "-W").splitlines()]
    rows = [row for row in rows if len(row) >= 8 and row[0].rstrip(":").isdigit()]
    return {row[7] for row in rows if (row[6] == "UND") == undefined}


def violations(library: Path) -> list[str]:
    """Everything that would keep this file from serving every Python and every torch from 2.10 on."""
    wanted = symbols(library, undefined=True)
    names = {symbol.partition("@")[0] for symbol in wanted}
    torch_names = {name for name in names if "torch" in name}
    found = [f"needs {name}" for name in needed_libraries(library) - SYSTEM - {"libtorch_cpu.so"}]
    found += [f"Python symbol {name}" for name in names if re.match(r"_?Py[A-Z_]", name)]
    found += [f"C++ symbol of libtorch {name}" for name in names if re.match(r"_Z\w*(2at|3c10|5torch)", name)]
    found += [f"not in torch's stable ABI: {name}" for name in torch_names if not STABLE.match(name)]
    found += [] if torch_names else ["no symbol of torch at all"]
    for symbol in wanted:
        version = re.search(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", symbol)
        if version and tuple(map(int, version[2].split("."))) > NEWEST[version[1]]:
            found.append(f"newer than manylinux_2_28: {symbol}")
    exported = {symbol for symbol in symbols(library, undefined=False) if "fusedres" in symbol} - FOR_PYTHON
    return sorted(found) + [f"exports {symbol}" for symbol in sorted(exported)]
