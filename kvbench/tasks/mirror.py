"""Data sets from a folder in place of the hub: <folder>/<dataset_path>/<dataset_name or default>/<split>.jsonl."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from kvbench.files import read_bytes, read_text

# Where a mirror may hold a relative of what a stock task names: the same articles, rare words written <unk>.
STAND_INS = {("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"): ("wikitext", "wikitext-2-v1")}


def find(data: Path | None, dataset_path: str, dataset_name: str | None) -> tuple[str, dict[str, Path]] | None:
    """The data set's folder inside the mirror and its files by split, or None where the mirror has no such folder."""
    names = [(dataset_path, dataset_name), STAND_INS.get((dataset_path, dataset_name or ""))]
    for path, name in filter(None, names):
        place = f"{path}/{name or 'default'}"
        if data is not None and (data / place).is_dir():
            return place, {file.stem: file for file in sorted((data / place).glob("*.jsonl"))}
    return None


def digest(path: Path) -> str:
    """The file's SHA-256, once its rows were found whole; kept while its size and time stay.

    Raises:
        ValueError: no file, or a broken row, as `file:line: what is wrong`.
    """
    return _checked(path, *_stamp(path))[1]


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, read once while its size and time stay; not to be changed.

    Raises:
        ValueError: no file; or, as `file:line: what is wrong`, a line that is no JSON object or lacks a field.
    """
    return list(_checked(path, *_stamp(path))[0])


def _stamp(path: Path) -> tuple[int, int]:
    """When a file last changed, in ns, and its bytes."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return stat.st_mtime_ns, stat.st_size


def load(mirror_files: dict[str, str], **_: Any) -> Any:
    """A `datasets.DatasetDict` of mirror files by split, in memory: what lm-eval calls in place of the hub."""
    import datasets

    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows(Path(file))) for split, file in mirror_files.items()}
    )


def hub_lacks(dataset_path: str) -> str | None:
    """Why the hub's data set cannot be had here, or None when it is in the local cache or the hub answers for it."""
    from huggingface_hub import constants

    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    if (prepared / dataset_path.replace("/", "___")).is_dir():
        return None
    if (Path(constants.HF_HUB_CACHE) / f"datasets--{dataset_path.replace('/', '--')}" / "snapshots").is_dir():
        return None
    return _hub_unreachable() or _hub_says(dataset_path)


@cache
def _hub_unreachable() -> str | None:
    """Asked once a process, so that a long list of data sets costs one time-out."""
    if not _answers():  # before the hub's client is imported, which takes as long as all else of a plan
        return "the hub cannot be reached"
    answer = _hub_says("Salesforce/wikitext")
    return None if answer is None or answer.startswith("the hub does not give it") else answer


def _answers() -> bool:
    """Whether the hub's machine takes a connection; behind a proxy only the hub's client can tell."""
    from huggingface_hub import constants

    place = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or not place.hostname or getproxies():
        return True
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname, port), timeout=10).close()
    except OSError:
        return False
    return True


@cache
def _hub_says(dataset_path: str) -> str | None:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    try:
        HfApi().dataset_info(dataset_path, timeout=10)
    except HfHubHTTPError as error:
        return f"the hub does not give it ({type(error).__name__})"
    except Exception:  # the HTTP library below, and so its exceptions, change with the hub client's version
        return "the hub cannot be reached"
    return None


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None


@lru_cache(maxsize=256)
def _checked(path: Path, mtime_ns: int, size: int) -> tuple[list[dict[str, Any]], str]:
    """A file's rows, found whole, and its SHA-256."""
    found: list[dict[str, Any]] = []
    # not splitlines(): text in JSON may hold other line separators as they are
    for number, line in enumerate(_text(path).rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a JSON object: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: not a JSON object but {type(row).__name__}")
        lacking = [field for field in (found[0] if found else row) if field not in row]
        if lacking:
            raise ValueError(f"{path}:{number}: no field {lacking[0]!r}, which the first row has")
        found.append(row)
    return found, hashlib.sha256(read_bytes(path)).hexdigest()
