"""Paths in a sweep's YAML: relative to the file that names them, wherever the command is given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvbench.files import named_path

MODEL_FILES = (".gguf", ".json")


def anchor(data: dict[str, Any], folder: Path) -> dict[str, str]:
    """Puts `folder` before each relative path in a YAML's data; returns what was written for each that it changed."""
    written = {}
    for holder, key, model in list(_places(data)):
        text = holder.get(key) if isinstance(holder, dict) else holder[key]
        if isinstance(text, str) and (not model or _is_path(text, folder)) and (moved := _moved(text, folder)) != text:
            holder[key] = moved
            written[moved] = text
    return written


def _places(data: dict[str, Any]) -> Iterator[tuple[Any, Any, bool]]:
    """Where a path may stand: a mapping or list, the key or index in it, and whether it is a model's name."""
    yield data, "data", False
    yield data, "model", True
    models = data.get("models")
    yield from ((models, index, True) for index in range(len(models) if isinstance(models, list) else 0))
    for entry in [data.get("model"), *(models if isinstance(models, list) else ())]:
        if isinstance(entry, dict):
            yield entry, "name", True
    yield from _calibrated(data)
    for entry in data.get("schemes") or () if isinstance(data.get("schemes"), list) else ():
        yield from _calibrated(entry)
    for entry in data.get("tasks") or () if isinstance(data.get("tasks"), list) else ():
        if isinstance(entry, dict):
            yield entry, "text", False
            yield entry, "data", False


def _calibrated(entry: Any) -> Iterator[tuple[Any, Any, bool]]:
    if isinstance(entry, dict) and isinstance(entry.get("calibration"), dict):
        yield entry["calibration"], "text", False


def _is_path(name: str, folder: Path) -> bool:
    """Whether a model's name is that of a file or folder, not of a known model or of one on the hub."""
    if name.startswith(("./", "../")) or name.endswith(MODEL_FILES):
        return True
    try:
        return bool(name) and (folder / name).exists()
    except OSError:
        return False


def _moved(text: str, folder: Path) -> str:
    try:
        path = named_path(text)
    except ValueError:  # said where it is read
        return text
    return text if path.is_absolute() or not text else str(folder / path)
