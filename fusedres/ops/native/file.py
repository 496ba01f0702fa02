"""The library's file, looked at before it is loaded: the loader of the system ends the process where it trusts it.

A file that was cut short gives a bus error when a page beyond its end is touched, and a second copy of the library
registers the operators of the first once more, which torch does not survive.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import torch

NAMESPACE = "fusedres_native"
ELF64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"
HEADER = struct.Struct("<16x 16x Q Q 6x H H H H 2x")  # e_phoff, e_shoff, sizes and numbers of their entries
SEGMENT = struct.Struct("<8x Q 16x Q 16x")  # p_offset, p_filesz


def problem(library: Path) -> str | None:
    """Why the loader must not see this file now, and what to do about it; None: nothing is against it."""
    if (cut := cut_short(library)) is not None:
        return cut
    if hasattr(getattr(torch.ops, NAMESPACE), "cpu_capability") and not is_loaded(library):
        others = sorted(path for path in torch.ops.loaded_libraries if Path(path).name == library.name)
        return (
            f"the operators of {NAMESPACE} are those of {' and '.join(others) or 'another file'}, and a process "
            "holds one. Start a new process, in which only one copy of fusedres is imported."
        )
    return None


def cut_short(library: Path) -> str | None:
    """What is missing at the end of the file; None: nothing, or it is none that the loader takes."""
    size = library.stat().st_size
    needed = max(ends(library, size), default=0)
    if needed <= size:
        return None
    return f"it is cut short: found {size} bytes, needed {needed}. Install fusedres again."


def ends(library: Path, size: int) -> Iterator[int]:
    """Where each part that the file's headers name ends, in bytes from its beginning."""
    with library.open("rb") as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(ELF64_LITTLE_ENDIAN):
            return
        segments, sections, segment_size, segment_count, section_size, section_count = HEADER.unpack(header)
        yield sections + section_size * section_count
        yield (end := segments + segment_size * segment_count)
        if end > size or segment_size != SEGMENT.size:
            return
        file.seek(segments)
        for offset, length in SEGMENT.iter_unpack(file.read(segment_size * segment_count)):
            yield offset + length


def is_loaded(library: Path) -> bool:
    """Whether loading this file would only find it again."""
    try:
        ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True
