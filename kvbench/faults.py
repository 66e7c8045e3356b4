"""Errors that are the machine's fault, and no model's or cell's, whatever a library made of them. Imports no torch."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from traceback import walk_tb

# a disk or a quota that is full, and a file larger than is allowed
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# what a file or a folder that someone named may be: closed to us, on a disk that fails, one of too many open at once
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE}
# what CUDA says of a compiled kernel that is cut off, another GPU's, or another kernel's
DAMAGED = ("kernel image", "named symbol not found")


def fault_of(error: BaseException) -> OSError | None:
    """What the machine lacks where an error, or one that it came from, says so: a full disk, or a limit."""
    for one in _origins(error):
        if isinstance(one, OSError) and one.errno in FULL:
            return one
        for code in FULL:
            # libraries written in Rust pass on the number in words
            if f"(os error {code})" in str(one):
                return OSError(code, os.strerror(code))
    return None


def closed_to_us(error: BaseException) -> OSError | None:
    """The error itself where the system names a file or a folder and keeps us from it."""
    return error if isinstance(error, OSError) and error.filename and error.errno in CLOSED else None


def triton_fault(error: BaseException) -> str | None:
    """A line on Triton's cache, or on what it builds with, and what to do, where an error came from there.

    Triton reads kernels that it compiled before without a look at them: a file that was cut off is a KeyError, a
    ValueError or a RuntimeError of the kernel's call.
    """
    for one in _origins(error):
        told = f"{type(one).__name__}: {' '.join(str(one).split())[:200]}"
        for frame, _ in walk_tb(one.__traceback__):
            module, name = frame.f_globals.get("__name__"), frame.f_code.co_qualname
            if module == "triton.compiler.compiler" and name.startswith("CompiledKernel."):
                reads = name.startswith("CompiledKernel.__init__")
                if reads or any(words in str(one) for words in DAMAGED):
                    return f"Triton's cache {_cache()} has a damaged file ({told}): remove that folder"
            if module == "triton.runtime.cache" and isinstance(one, OSError):
                why = f"{one.filename}: {one.strerror}" if one.filename else told
                return f"Triton's cache {_cache()} can't be used ({why}): name another folder with TRITON_CACHE_DIR"
            if module == "triton.runtime.build":
                return f"Triton can't build what launches kernels on this machine: {told}"
    return None


def is_the_machine_s(error: BaseException) -> bool:
    """Whether an error is one of those, or memory's end, or the GPU's own: not what a model or a kernel asks for."""
    torch = sys.modules.get("torch")
    kinds = (MemoryError, *((torch.OutOfMemoryError, torch.AcceleratorError) if torch else ()))
    if any(isinstance(one, kinds) or "DefaultCPUAllocator" in str(one) for one in _origins(error)):
        return True
    return fault_of(error) is not None or triton_fault(error) is not None


def _cache() -> str:
    triton = sys.modules.get("triton")
    return str(triton.knobs.cache.dir) if triton else "~/.triton/cache"


def _origins(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it came from."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__
