"""A first sweep of a model, with what this machine and the model say already."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

from kvbench.dtypes import all_dtypes
from kvbench.files import named_path, write_text
from kvbench.sweep.parts import REAL, ModelFacts, Parts, default_device
from kvbench.sweep.spec import ModelSpec

SCHEMA = "sweep.schema.json"
WHY_CENTRED = {
    True: "its keys have a bias, which uses up the range of low-bit codes; centring takes it off",
    False: "its keys have no bias, so the window does most of it, and centring a little",
    None: "centring is for keys with a bias: `kvbench doctor --keys MODEL` says whether its keys have one",
}


def first_sweep(name: str, parts: Parts = REAL, device: str | None = None) -> tuple[str, str]:
    """A name for the sweep, and its YAML with comments, for a model that this machine knows or can fetch.

    Raises:
        ValueError: a name that can be no model.
    """
    facts = parts.find_model(ModelSpec(name=name))
    called = re.sub(r"[^A-Za-z0-9._-]+", "-", facts.name.rsplit("/", 1)[-1]).strip("-.")[:60] or "first"
    gpu = (device or default_device()) != "cpu"
    return called, "\n".join([*_head(called, name, facts, gpu), *_dtypes(facts), *_tasks(facts, gpu), *_rest()]) + "\n"


def _head(called: str, name: str, facts: ModelFacts, gpu: bool) -> list[str]:
    known = []
    if facts.layers:
        heads, head_dim = facts.layers[0]
        known.append(f"{len(facts.layers)} layers, {heads} KV heads of {head_dim}")
    if facts.max_length:
        known.append(f"up to {facts.max_length} tokens")
    if facts.parameters:
        known.append(f"{facts.parameters / 1e6:.0f} million parameters")
    lines = [
        f"# yaml-language-server: $schema={SCHEMA}",
        f"# {facts.name}{': ' if known else ''}{', '.join(known)}.",
        "# `kvbench plan` says what this takes and lacks, `kvbench sweep` runs it; all keys: docs/yaml.md",
    ]
    if facts.missing:
        lines.append(f"# not here yet: {facts.missing}")
    return [
        *lines,
        f"name: {called}",
        f"model: {_scalar(name)}",
        f"# computes in {facts.compute_dtype}" + (" on this GPU" if gpu else ", for there is no GPU here"),
        "",
    ]


def _scalar(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z][\w./-]*", text) else repr(text)


def _dtypes(facts: ModelFacts) -> list[str]:
    bits = ""
    if facts.layers:
        int4 = all_dtypes()["int4_per_token_head"].bits_per_value(facts.layers[0][1])
        bits = f"; int4 takes {int4:.2f} bits a value here, scales included"
    return [
        f"# how keys and values are stored (`kvbench ls dtypes`){bits}",
        "dtypes: [fp16, int8, int4, int2]",
        "# prepares rows first; default is the one that a dtype was proposed with",
        "rotations: [none, default]",
        "# centred keys, and recent tokens and sinks in 16 bits (`kvbench ls schemes` has all):",
        f"# {WHY_CENTRED[facts.key_bias]}",
        "schemes: [int4_centered_window]",
        "",
    ]


def _tasks(facts: ModelFacts, gpu: bool) -> list[str]:
    longest = facts.max_length or 2048
    if not facts.tokenizer:
        prompt, new = min(8192 if gpu else 512, longest // 2), min(128, longest // 2)
        return [
            "# a zeroed cache is as fast",
            "canary: false",
            "tasks:",
            "  # tokens per second, and how long a context fits: of random weights there is nothing else to say",
            f"  - {{task: throughput, prompt: {_k(prompt)}, new: {new}, batch: {8 if gpu else 2}}}",
            "",
        ]
    context = min(2048 if gpu else 512, longest)
    tokens = (32 if gpu else 4) * context
    needle = [size for size in (1024, 4096, 16384) if size <= longest][: 3 if gpu else 1]
    chat = ", apply_chat_template: true" if facts.chat_template else ""
    limit = "" if gpu else ", limit: 32"
    lines = [
        "tasks:",
        "  # how far the next-token distribution moves: the most sensitive, and needs no data",
        f"  - {{task: divergence, tokens: {_k(tokens)}, context: {_k(context)}}}",
    ]
    if needle:
        lines += [
            "  # a number that is told in a long text and asked for at its end; needs no data",
            f"  - {{task: needle, contexts: [{', '.join(map(_k, needle))}]{'' if gpu else ', per_cell: 2'}}}",
        ]
    return [
        *lines,
        "  # any task of lm-eval (`kvbench ls tasks`), from the hub or the folder that `data:` or KVBENCH_DATA names",
        f"  # - {{task: gsm8k, num_fewshot: 5{chat}{limit}}}",
        "",
    ]


def _k(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


def _rest() -> list[str]:
    return [
        "# the difference that does not matter, fixed before anything is measured",
        "margin: 1pp",
    ]


def write_first(name: str, path: Path | None, schema: dict[str, Any], parts: Parts = REAL) -> list[Path]:
    """Writes the YAML, and the schema that its first line names where that is not there; returns what it wrote.

    Raises:
        FileExistsError: the YAML is there already.
        ValueError, OSError: no such model, or a place that can't be written to.
    """
    called, text = first_sweep(name, parts)
    place = path or Path(f"{called}.yaml")
    if named_path(name).exists() and place.parent.resolve() != Path.cwd():
        moved = _scalar(os.path.relpath(name, place.parent))
        text = text.replace(f"\nmodel: {_scalar(name)}\n", f"\nmodel: {moved}\n")
    if os.path.lexists(place):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
    write_text(place, text)
    beside = place.with_name(SCHEMA)
    if beside.exists():
        return [place]
    write_text(beside, json.dumps(schema, indent=1, ensure_ascii=False) + "\n")
    return [place, beside]
