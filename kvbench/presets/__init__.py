"""Schemes by name, one YAML file each: its source, and what a sweep's YAML has under `schemes`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Preset:
    """spec: as `Scheme.of` takes it. source: where the scheme comes from."""

    name: str
    spec: dict[str, Any]
    source: str


@cache
def all_presets() -> dict[str, Preset]:
    """Every preset by name: files of this folder."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where PyYAML has it: six times as fast
    found = {}
    for file in sorted(files(__name__).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            name = file.name.removesuffix(".yaml")
            spec = yaml.load(file.read_text(encoding="utf-8"), loader)
            found[name] = Preset(name, spec, spec.pop("source"))
    return found
