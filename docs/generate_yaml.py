"""Writes docs/yaml.md and configs/sweep.schema.json from the code they are about: `make docs`; a test compares."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from kvbench.cli import app
from kvbench.environment import READS
from kvbench.render import markdown as md
from kvbench.sweep.config import DtypeSpec, Sweep
from kvbench.sweep.schema import keys, schema
from kvbench.tasks.base import Options

INTRODUCTION = """\
<!-- written by docs/generate_yaml.py (make docs); not by hand -->

# Every key, option, flag and variable

A sweep is one YAML file. `kvbench init MODEL` writes a first one, and `kvbench schema` the JSON Schema by which an
editor completes and checks it, once its first line names that file: `# yaml-language-server: $schema=FILE`. Where
tokens are counted, `16k` is 16384. Paths are relative to the YAML. `--set KEY=VALUE` changes one value, such as
`--set tasks[0].limit=50`.
"""


# of what is checked by code of its own
WORDS = {
    "model": "a name or a mapping",
    "models": "a list of these",
    "dtypes": "a list of names or mappings",
    "rotations": "a list of names, `A+B`, `KEY:VALUE` or mappings with key and value",
    "schemes": "a list of names or mappings",
    "calibration": "a mapping",
    "tasks": "a list of names or mappings",
    "baseline": "as `dtype` below",
    "dtype": "a name, `KEY:VALUE` or a mapping",
}


def page() -> str:
    """docs/yaml.md."""
    lines = [INTRODUCTION]
    for title, kind, names in keys():
        lines += [f"## {title}", ""]
        about = (kind.__doc__ or "").split("\n")[0]
        lines += [about, "", *_table(("key", "takes", "default", "meaning"), [_key(kind, name) for name in names]), ""]
    lines += ["## Flags", ""]
    for name, command in sorted(_commands()):
        lines += [f"### `kvbench {name}`", "", " ".join((command.help or "").split("\n\n")[0].split()), ""]
        lines += [*_table(("flag", "meaning"), [_flag(one) for one in command.params if one.name != "help"]), ""]
    lines += [
        "## Environment variables",
        "",
        *_table(("variable", "meaning"), [(f"`{n}`", t) for n, t in READS.items()]),
    ]
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, [":---"] * len(head), *escaped)]


def _key(kind: type[BaseModel], name: str) -> tuple[str, str, str, str]:
    field = kind.model_fields[name]
    inherited = Options.model_fields.get(name)
    text = " ".join((field.description or (inherited.description if inherited else None) or "").split())
    if not text:
        raise SystemExit(f"{kind.__name__}.{name} has no description: write one below it")
    default = "" if field.is_required() else _shown(field.get_default(call_default_factory=True))
    takes = WORDS.get(name) if kind in (Sweep, DtypeSpec) else None
    return f"`{name}`", takes or _takes(schema_of(kind)["properties"][name]), default, text


def schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    """A model's plain schema."""
    from kvbench.sweep.schema import _plain

    return _plain(kind)


def _takes(one: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "enum" in one or "const" in one:
        return ", ".join(f"`{value}`" for value in one.get("enum", [one.get("const")]))
    if "anyOf" in one:
        parts = [_takes(part) for part in one["anyOf"] if part.get("type") != "null"]
        return "tokens" if parts == ["a whole number", "text"] else " or ".join(dict.fromkeys(parts))
    if one.get("type") == "array":
        return f"a list of {_takes(one.get('items', {}))}" if one.get("items") else "a list"
    words = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
    return words.get(one.get("type", ""), "a mapping" if one.get("type") == "object" or "$ref" in one else "see below")


def _shown(value: Any) -> str:
    if value is None or value in ("", (), [], {}):
        return ""
    return f"`{json.dumps(value, default=str)}`" if not isinstance(value, str) else f"`{value}`"


def _commands() -> Iterator[tuple[str, Any]]:
    def below(command: Any, name: str) -> Iterator[tuple[str, Any]]:
        for child, one in getattr(command, "commands", {}).items():
            full = f"{name} {child}".strip()
            if hasattr(one, "commands"):
                yield from below(one, full)
            else:
                yield full, one

    yield from below(typer.main.get_command(app), "")


def _flag(one: Any) -> tuple[str, str]:
    if one.param_type_name == "option":
        name = ", ".join(one.opts) + (f" {one.metavar}" if one.metavar else "")
    else:
        name = one.metavar or one.name.upper()
    return f"`{name}`", md.plain(" ".join((one.help or "").split()))


if __name__ == "__main__":
    root = Path(__file__).parent.parent
    (root / "docs" / "yaml.md").write_text(page(), encoding="utf-8")
    (root / "configs" / "sweep.schema.json").write_text(json.dumps(schema(), indent=1, ensure_ascii=False) + "\n")
