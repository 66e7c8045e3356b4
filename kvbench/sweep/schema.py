"""The JSON Schema of a sweep's YAML, by which an editor completes and checks it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from kvbench.dtypes import all_dtypes
from kvbench.presets import all_presets
from kvbench.runners.backends import all_backends
from kvbench.runners.catalog import EMBEDDED
from kvbench.sweep.config import DtypeSpec, Sweep
from kvbench.tasks import OURS
from kvbench.tasks.base import Options
from kvbench.tasks.lm_eval import LmEval
from kvbench.transforms import all_transforms

TOKENS = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^[0-9]+[kK]$"}]}


def schema() -> dict[str, Any]:
    """What a sweep's YAML may hold: every key with what it means, names as suggestions, since they may be short."""
    made = _plain(Sweep)
    keys: dict[str, Any] = made["properties"]
    model = {"anyOf": [_name([*EMBEDDED]), {"$ref": "#/$defs/ModelSpec"}]}
    dtype = {"anyOf": [_name([*all_dtypes()]), _pair(_name([*all_dtypes()]))]}
    turn = _name(["default", *all_transforms()])
    rotation = {"anyOf": [turn, _pair({"anyOf": [turn, {"type": "array", "items": turn}]})]}
    entry = {**_plain(DtypeSpec)["properties"], "key": _name([*all_dtypes()]), "value": _name([*all_dtypes()])}
    entry = {**entry, "dtype": {**entry["dtype"], **dtype}, "rotation": rotation}
    entry["rotations"] = {**entry["rotations"], "type": "array", "items": rotation}
    entry["rotations"].pop("anyOf", None)
    scheme = {"anyOf": [_name([*all_presets()]), {"type": "object"}]}
    items = {
        "dtypes": {"anyOf": [dtype, _mapping(entry)]},
        "rotations": rotation,
        "schemes": scheme,
        "models": model,
        "tasks": {"anyOf": [_name([*OURS]), *(_task(kind, name) for name, kind in [*OURS.items(), (None, LmEval)])]},
    }
    for name, item in items.items():
        keys[name] = {"description": keys[name]["description"], "type": "array", "minItems": 1, "items": item}
    keys["model"] = {"description": keys["model"]["description"], **model}
    keys["baseline"] = {**keys["baseline"], **dtype}
    made["$defs"]["ModelSpec"]["properties"]["backend"] |= {"enum": [*all_backends()]}
    made["required"] = ["name", "tasks"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A sweep of kvbench", **made}


def _plain(kind: type[BaseModel]) -> dict[str, Any]:
    """A model's schema as pydantic makes it, a description on one line, and tokens also as 16k."""
    made = kind.model_json_schema()
    for name, key in made.get("properties", {}).items():
        key.pop("title", None)
        own = kind.model_fields[name]
        inherited = Options.model_fields.get(name)
        if text := own.description or (inherited.description if inherited else None):
            key["description"] = " ".join(text.split())
        if _counts_tokens(own.metadata):
            for keyword in ("type", "ge", "exclusiveMinimum", "minimum", "maximum"):
                key.pop(keyword, None)
            key.update(TOKENS)
        elif name in ("contexts", "positions"):
            key["items"] = TOKENS if name == "contexts" else {"anyOf": [{"type": "integer"}, TOKENS["anyOf"][1]]}
    made.pop("title", None)
    made["description"] = (kind.__doc__ or "").split("\n")[0]
    return made


def _counts_tokens(metadata: list[Any]) -> bool:
    from kvbench import sizes

    return any(getattr(one, "func", None) is sizes.tokens for one in metadata)


def _name(known: list[str]) -> dict[str, Any]:
    """A text; `known` are suggested, and others are for kvbench to judge."""
    return {"anyOf": [{"enum": known}, {"type": "string"}]}


def _pair(item: dict[str, Any]) -> dict[str, Any]:
    return _mapping({"key": item, "value": item})


def _mapping(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _task(kind: type[Options], name: str | None) -> dict[str, Any]:
    """A task's entry with options; name: of one of kvbench's own, None for those of lm-eval."""
    made = _plain(kind)
    known = {"const": name} if name else {"type": "string", "not": {"enum": [*OURS]}}
    made["properties"] = {"task": known, **{key: one for key, one in made["properties"].items() if key != "task"}}
    made["required"] = ["task"]
    return made


def keys() -> Iterator[tuple[str, type[BaseModel], list[str]]]:
    """The parts of a YAML for a page: a title, the model, and its keys."""
    from kvbench.sweep.spec import ModelSpec

    yield "A sweep", Sweep, list(Sweep.model_fields)
    yield "An entry of `models`, or `model` as a mapping", ModelSpec, list(ModelSpec.model_fields)
    yield "An entry of `dtypes` as a mapping", DtypeSpec, list(DtypeSpec.model_fields)
    for name, kind in OURS.items():
        yield f"Task `{name}`", kind, list(kind.model_fields)
    yield "Any task of lm-eval", LmEval, list(LmEval.model_fields)
