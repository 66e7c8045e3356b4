"""Files and folders that a person names: one kind of error. Files of ours: whole or absent. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_PATH = 4096  # PATH_MAX: no longer name can be opened
DRAFT = ".draft-"  # of names that are never read, and that the next writer sweeps away


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


def portable(value: Any) -> Any:
    """A value of JSON in which paths name no folder of this machine: of a whole path to what is here, the last part."""
    if isinstance(value, Mapping):
        return {name: portable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    if not isinstance(value, str) or not value.startswith(("/", "~")):
        return value
    try:
        path = named_path(value)
    except ValueError:
        return value
    return path.name if path.is_absolute() and is_there(path) else value


def is_there(path: Path) -> bool:
    """Whether anything is there; a name that none can have is nothing."""
    try:
        return path.exists()
    except OSError:
        return False


def unwritable(path: Path) -> str:
    """Why nothing can be written at a path, as far as its folders say; empty where something can."""
    place = path.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is no folder"
    return "" if os.access(place, os.W_OK | os.X_OK) else f"{place} cannot be written to"


# ---- files of ours


class NotAFileError(ValueError):
    """What is there is no file: reading a FIFO would wait for ever, and a device may have no end."""


def check_file(path: Path, follow: bool = True) -> None:
    """Raises NotAFileError for a FIFO, a device, a socket or a folder, and OSError where nothing is there.

    follow: whether a symbolic link stands for what it points to; else it is refused.
    """
    mode = path.stat(follow_symlinks=follow).st_mode
    kinds = {
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a symbolic link",
    }
    if not stat.S_ISREG(mode):
        raise NotAFileError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'no file')}: expected a file")


def read_json(path: Path, follow: bool = True) -> Any:
    """What a JSON file says.

    Raises:
        OSError, ValueError: it is not there, no file, or no JSON that can be shown.
    """
    check_file(path, follow)
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    if "\\ud" in text.lower():  # half a surrogate pair can be written as an escape, and could not be shown
        json.dumps(value, ensure_ascii=False).encode()
    return value


def draft_in(folder: Path) -> Path:
    """A path in a folder for what is to be renamed into its place."""
    return folder / f"{DRAFT}{uuid.uuid4().hex}"


def write_text(path: Path, text: str) -> None:
    """A file with this text, as `write_bytes` writes one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """A file with these bytes, on the disk when this returns: the old one or the new one, never a part of it.

    A symbolic link there is replaced, and what it points to is left alone.

    Raises:
        OSError: it can't be written; the error names `path`, which the system doesn't of a full disk.
    """
    draft = draft_in(path.parent)
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def flush(path: Path) -> None:
    """Writes a file or a folder's entries through to the disk, so that a power cut keeps the order of renames."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_real_folder(path: Path) -> bool:
    """Whether a folder is there, and no symbolic link to one."""
    return path.is_dir() and not path.is_symlink()


def discard(path: Path) -> None:
    """Removes a file, a folder with all in it, or a symbolic link without what it points to."""
    if is_real_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep_away(draft: Path) -> None:
    """Removes a draft as far as that goes: on NFS what another process has open stays, for the next writer."""
    with contextlib.suppress(OSError):
        discard(draft)


def set_aside(path: Path) -> None:
    """Renames what is in the way to `.broken-1-NAME`, for whoever wants to look."""
    number = 1
    while os.path.lexists(aside := path.with_name(f".broken-{number}-{path.name}")):
        number += 1
    path.rename(aside)


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Sole right to what the lock file stands for, while the block runs; a process that ends gives it back.

    Anything else in the lock file's place, such as a symbolic link, is set aside.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
    """
    import fcntl

    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        set_aside(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
