"""A compiled kernel that was cut off in Triton's cache is refused: CUDA ends the process over one."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BINARIES = {".cubin", ".hsaco"}  # both ELF
HEADER = 64  # bytes of an ELF file's, of 64 bits


def refuse_cut_off(module: Any, function: Any, name: str, files: Mapping[str, str], key: str) -> None:
    """Triton's hook before it loads a kernel.

    files: the kernel's own in Triton's cache, by name.

    Raises:
        ValueError: a binary is shorter than its header says.
    """
    for path in map(Path, files.values()):
        if path.suffix in BINARIES and path.is_file():
            with path.open("rb") as file:
                header, size = file.read(HEADER), file.seek(0, os.SEEK_END)
            if (end := _end(header)) > size:
                # "kernel image" is what CUDA says of such files too, and how kvbench.faults knows them
                raise ValueError(f"kernel image {path.name} has {size} bytes of {end} or more")


def _end(header: bytes) -> int:
    """Where the last of an ELF file's two tables ends, which compilers write behind all else, by its first bytes."""
    if len(header) < HEADER:
        return HEADER
    offsets = struct.unpack_from("<2Q", header, 32)
    (size, count), (other_size, other_count) = struct.iter_unpack("<2H", header[54:62])
    return max(offsets[0] + size * count, offsets[1] + other_size * other_count)
