"""Which tasks, groups and tags lm-eval has, and where their YAML is: by a text scan, without importing it.

lm-eval's own scan parses every file and takes 10 s and more; this one reads the few lines that name things, 2 s once
per version, and keeps the answer in the cache directory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from kvbench.environment import cache_dir

OURS = Path(__file__).parent / "lm_eval_tasks"
FORMAT = 1  # of the cached index

_NAMING = re.compile(r"^[\"']?(?:task|group|tag|include|class)[\"']?[ \t]*:.*(?:\n(?:[ \t\-#].*)?)*", re.MULTILINE)
_FUNCTION = re.compile(r"!function\s+([\w.]+)\.\w+")


@dataclass(frozen=True)
class Entry:
    """path: of its YAML, None for a tag. members: tasks and groups in a group or under a tag."""

    name: str
    kind: Literal["task", "group", "tag"]
    path: str | None
    members: tuple[str, ...] = ()


class _Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    """Reads lm-eval's YAML; a tag such as `!function` gives its text."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {node.value}")


@cache
def version() -> str:
    """The installed lm-eval's version."""
    return importlib.metadata.version("lm-eval")


@cache
def index() -> dict[str, Entry]:
    """Every name lm-eval knows, ours included."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ValueError("lm-eval is not installed: install lm-eval>=0.4.13")
    root = Path(spec.origin).parent / "tasks"
    return _cached_scan(root) | scan(OURS)


def scan(root: Path) -> dict[str, Entry]:
    """The entries of all YAML files under a folder; of two files with one name the first, in order of path, counts."""
    entries: dict[str, Entry] = {}
    tagged: dict[str, list[str]] = {}
    for path in sorted(root.glob("**/*.yaml"), key=lambda path: path.as_posix()):
        try:
            named = _named(path)
        except (OSError, ValueError, yaml.YAMLError):
            continue  # lm-eval skips it too
        kind: Literal["task", "group"] = "group" if "group" in named and "class" not in named else "task"
        name = named.get(kind)
        if not isinstance(name, str) or name in entries:
            continue
        members = _members(named.get("task")) if kind == "group" else ()
        entries[name] = Entry(name, kind, str(path), members)
        for tag in _listed(named.get("tag")) if kind == "task" else ():
            tagged.setdefault(tag, []).append(name)
    tags = {tag: Entry(tag, "tag", None, tuple(sorted(names))) for tag, names in tagged.items() if tag not in entries}
    return entries | tags


def closure(name: str) -> dict[str, Entry]:
    """An entry and all that it holds, however deep."""
    found: dict[str, Entry] = {}
    todo = [name]
    while todo:
        entry = index().get(todo.pop())
        if entry and entry.name not in found:
            found[entry.name] = entry
            todo += entry.members
    return found


@cache
def config(path: Path) -> dict[str, Any]:
    """A YAML file with what it includes, as lm-eval merges them; functions stay text."""
    merged: dict[str, Any] = {}
    own = _load(path.read_text(encoding="utf-8"))
    for include in _listed(own.pop("include", None)):
        merged |= config(path.parent / include)
    return merged | own


@cache
def digest(path: Path) -> str:
    """SHA-256 over a YAML file, its includes and the Python files beside them that they name."""
    content = path.read_bytes()
    hashed = hashlib.sha256(content)
    for include in _listed(_load(content.decode()).get("include")):
        hashed.update(digest(path.parent / include).encode())
    for module in sorted(set(_FUNCTION.findall(content.decode()))):
        source = path.parent / f"{module.replace('.', '/')}.py"
        if source.exists():
            hashed.update(source.read_bytes())
    return hashed.hexdigest()


def _cached_scan(root: Path) -> dict[str, Entry]:
    place = hashlib.sha256(str(root).encode()).hexdigest()[:12]
    file = cache_dir() / f"lm-eval-{version()}-{place}-{FORMAT}.json"
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return {row["name"]: Entry(row["name"], row["kind"], row["path"], tuple(row["members"])) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    entries = scan(root)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as draft:
            json.dump([asdict(entry) for entry in entries.values()], draft)
        Path(draft.name).replace(file)
    except OSError:
        pass  # a cache that can't be written costs two seconds, no more
    return entries


def _load(content: str) -> dict[str, Any]:
    loaded = yaml.load(content, Loader=_Loader)
    return loaded if isinstance(loaded, dict) else {}


def _named(path: Path) -> dict[str, Any]:
    """The lines of a file that name things, and those of its includes."""
    own = _load("\n".join(block.group() for block in _NAMING.finditer(path.read_text(encoding="utf-8"))))
    merged: dict[str, Any] = {}
    for include in _listed(own.pop("include", None)):
        merged |= _included(path.parent / include)
    return merged | own


@cache
def _included(path: Path) -> dict[str, Any]:
    return _named(path)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _members(items: Any) -> tuple[str, ...]:
    """Names in a group's `task:` list; an inline group's too."""
    names: list[str] = []
    for item in [items] if isinstance(items, str) else items or []:
        if isinstance(item, str):
            names.append(item)
        elif isinstance(item, dict):
            inner = item.get("task")
            names += [group] if isinstance(group := item.get("group"), str) else []
            names += [inner] if isinstance(inner, str) else _members(inner)
    return tuple(dict.fromkeys(names))
