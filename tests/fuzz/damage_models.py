"""Damaged model folders: `kvbench plan` takes each as it is, or says in one line what is wrong with which."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from campaign import Case, refusal
from typer.testing import CliRunner

from kvbench.cli import app

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, "vocab_size": 300, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip
ODD = (None, True, -1, 0, 10**30, 0.5, "", "4", "x" * 300, [], {}, [None], {"a": []}, "\x1b[31m", "../x")
OTHERS = ("layer_types", "rope_scaling", "sliding_window", "text_config")
FILES = ("config.json", "model.safetensors", "tokenizer_config.json", "generation_config.json")


def damaged(draw: random.Random, folder: Path) -> None:
    """A small model folder with a fault: another value, a field lost, a file lost, cut short, changed or no file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = dict(CONFIG)
    contents = dict.fromkeys(FILES, b"{}")
    contents["model.safetensors"] = (2).to_bytes(8, "little") + b"{}"
    kind = draw.choice(("value", "value", "value", "lost", "file", "cut", "byte", "folder"))
    if kind == "value":
        config[draw.choice((*config, "layer_types", "rope_scaling", "sliding_window", "text_config"))] = draw.choice(
            ODD
        )
    if kind == "lost":
        del config[draw.choice(list(config))]
    contents["config.json"] = json.dumps(config).encode()
    name = draw.choice(FILES)
    if kind == "file":
        del contents[name]
    if kind == "cut":
        contents[name] = contents[name][: draw.randrange(len(contents[name]) + 1)]
    if kind == "byte":
        at = draw.randrange(len(contents[name]))
        contents[name] = contents[name][:at] + bytes([draw.randrange(256)]) + contents[name][at + 1 :]
    for one, content in contents.items():
        (folder / one).write_bytes(content)
    if kind == "folder":
        (folder / name).unlink()
        (folder / name).mkdir()


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    """Damaged folders, each taken by `kvbench plan` and by nothing that would run it."""
    for number in range(count):
        yield Case(f"model {seed}/{number}", partial(planned, folder / "damaged", random.Random(f"{seed}/{number}")))


def planned(folder: Path, draw: random.Random) -> str:
    """The outcome of `kvbench plan` of a sweep over a damaged folder."""
    damaged(draw, folder)
    file = folder.parent / "sweep.yaml"
    file.write_text(f"name: x\nmodel: {folder}\ndtypes: [int4]\ntasks: [divergence]\n")
    done = CliRunner().invoke(app, ["plan", str(file), "--output", str(folder.parent / "none")])
    named = rf"^error: ({re.escape(str(file))}:2:\d+: |model damaged)"
    return refusal(done.exit_code, done.stdout, done.stderr, done.exception, named)
