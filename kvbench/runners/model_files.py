"""What finding and converting a model have in common: its files, their hashes, and one kind of error."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from kvbench.environment import cache_dir
from kvbench.files import read_text

Layers = tuple[tuple[int, int], ...]  # (KV heads, head_dim) of each layer that has a KV cache

ComputeDtype = Literal["float32", "bfloat16", "float16"]

CLOCK_STEP_S = 2.0  # file systems' times are this coarse: a file changed so lately may change again at the same time


NO_TOKENIZER = "a model of random weights has no tokenizer: run the task throughput, which needs none"


class ModelError(ValueError):
    """A model that can't be found, read or loaded; the message says what to do."""


class RefusedError(ModelError):
    """A model that would be measured wrongly."""


@contextmanager
def one_error(what: str) -> Iterator[None]:
    """What libraries raise for unusable models, as one line that begins with `what`."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # file formats' readers raise what they like: IndexError, KeyError, struct.error, …
        raise ModelError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error's message on one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "…"


def file_sha256(*paths: Path) -> str:
    """The SHA-256 of a file, or of several joined; hashed again only where a size or time of change is another."""
    paths = tuple(path.resolve() for path in paths)
    if odd := next((path for path in paths if not path.is_file()), None):
        raise ModelError(f"cannot read {odd}: it is no file")
    stats = [path.stat() for path in paths]
    facts = [f"{path}|{s.st_size}|{s.st_mtime_ns}|{s.st_ino}" for path, s in zip(paths, stats, strict=True)]
    note = cache_dir() / "hashes" / hashlib.sha256("\n".join(facts).encode()).hexdigest()
    try:
        known = note.read_text()
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    except OSError:
        pass
    digest = read_sha256(*paths)
    if any(abs(time.time() - s.st_mtime) < CLOCK_STEP_S for s in stats):
        return digest
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with draft_folder(note.parent) as draft:
            (draft / note.name).write_text(digest)
            (draft / note.name).replace(note)
    except OSError:
        pass  # a cache that can't be written costs time, nothing else
    return digest


def read_sha256(*paths: Path) -> str:
    """The SHA-256 of a file, or of several joined, all of it read."""
    hashed = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: hashed)
    return hashed.hexdigest()


@contextmanager
def draft_folder(parent: Path) -> Iterator[Path]:
    """A folder of our own in `parent` that is gone after the block, if it has not been renamed."""
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=parent))
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; numbers that JSON lacks as transformers writes them, {"__float__": "Infinity"}.

    Raises:
        ModelError: no such file, or no object in it.
    """
    try:
        content = json.loads(read_text(path), object_hook=_float_or_object)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"cannot read {path}: expected an object, got {type(content).__name__}")
    return content


def _float_or_object(found: dict[str, Any]) -> Any:
    return float(found["__float__"]) if found.keys() == {"__float__"} else found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object to a JSON file, its keys sorted."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def transformers_config(config: Mapping[str, Any] | Path, **options: Any) -> Any:
    """What transformers makes of a config.json, or of a folder, its defaults filled in."""
    from transformers import AutoConfig

    try:
        if isinstance(config, Path):
            return AutoConfig.from_pretrained(config, local_files_only=True, **options)
        fields = {key: value for key, value in config.items() if key != "model_type"}
        return AutoConfig.for_model(str(config.get("model_type")), **fields)
    except Exception as error:  # a configuration class may raise anything for a file that is not its own
        raise ModelError(f"transformers cannot read this model's configuration: {one_line(error)}") from error
