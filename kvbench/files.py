"""Files and folders that a person names: whatever the name is, one kind of error."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MAX_PATH = 4096  # PATH_MAX: no longer name can be opened


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """What a regular file holds. Nothing else is opened: a FIFO would wait for ever, a device never end.

    Raises:
        OSError: it can't be read, is no file, or has more than `most` bytes.
    """
    try:
        # not to wait for whoever writes to a FIFO
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file, but a pipe or a device", str(path))
            if most is not None and status.st_size > most:
                raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, and at most {most} are read", str(path))
            return file.read()
    except ValueError as error:  # a NUL in its name
        raise OSError(errno.EINVAL, str(error), str(path)) from None


def read_text(path: Path, most: int | None = None) -> str:
    """The UTF-8 text of a regular file, its line ends as "\\n".

    Raises:
        OSError: as `read_bytes`.
        UnicodeDecodeError: it is no UTF-8.
    """
    return read_bytes(path, most).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def named_path(text: str) -> Path:
    """The path that a person wrote, `~` and `~name` replaced.

    Raises:
        ValueError: it can be no path.
    """
    if "\0" in text or len(os.fsencode(text)) > MAX_PATH or any(len(os.fsencode(p)) > 255 for p in text.split("/")):
        raise ValueError(f"expected a path, not {len(text)} characters with a name that no file can have")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no such home: {str(error).rstrip('.').lower()}") from None


def is_folder(path: Path) -> bool:
    """Whether a folder is there; a name that none can have is none."""
    try:
        return path.is_dir()
    except OSError:
        return False
