"""One sweep on 1, 2 and more GPUs of a machine; and a model split over two beside the same layers on one.

`scale` runs a matrix by `--executor ray` (or `process`) on so many GPUs, each time into a new folder, and says how many
times faster the cells are done, and the whole command with what it takes to start. `split` draws a shape's first layers
on one GPU and on two, compares what both say to the bit, and times them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from kvbench.environment import describe
from kvbench.results import Record, Store
from kvbench.runners import catalog, placement
from kvbench.runners.base import GenerateRequest, ScoreRequest
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme

SCALE = {
    "name": "scale",
    "compute_dtype": "bfloat16",
    "dtypes": [
        "fp16",
        "int8",
        "int4",
        "int2",
        "fp8_per_tensor",
        "fp8_per_token_head",
        {"key": "int8", "value": "int4"},
        {"key": "int8", "value": "int2"},
    ],
    "rotations": ["none", "hadamard"],
    # it is asked once a worker, and so belongs to the start
    "agreement": False,
    # many cells of seconds, so that little is left over when the last ones end
    "tasks": [
        {"task": "divergence", "tokens": 8192, "context": 2048},
        {"task": "needle", "contexts": [2048, 4096], "depths": 5, "per_cell": 2},
    ],
}


# ---- one sweep on several GPUs


def scale(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds by number of GPUs, and how often the numbers are those of the first run."""
    folder = Path(tempfile.mkdtemp(prefix="gpus-"))
    config = {**SCALE, "model": options.model, **json.loads(options.set)}
    (folder / "scale.yaml").write_text(yaml.safe_dump(config))
    # kernels are compiled, weights converted and files read before a clock runs
    warm = run_sweep(folder, "warm", options, max(options.gpus), ["--limit", "1"])
    del warm["began"]
    runs, records = {}, {}
    for count in options.gpus:
        runs[count] = run_sweep(folder, str(count), options, count, [])
        store = Store(folder / str(count))
        records[count] = store.load().records
        # a record's own stamp is of a second; it is written as soon as its cell is done
        ends = {name: (store.cells / name / "record.json").stat().st_mtime for name in records[count]}
        runs[count] |= spans(records[count], ends, runs[count].pop("began"))
        print(count, runs[count], flush=True)
        keep(options, compared(options, config, warm, runs, records))  # of what is stopped, what was done is kept
    return compared(options, config, warm, runs, records)


def compared(
    options: argparse.Namespace,
    config: dict[str, Any],
    warm: dict[str, Any],
    runs: dict[int, dict[str, Any]],
    records: dict[int, dict[str, Record]],
) -> dict[str, Any]:
    """The runs beside each other."""
    first = records[options.gpus[0]]
    one = runs.get(1)
    return {
        "config": config,
        "executor": options.executor,
        "warm": warm,
        "runs": runs,
        "times_as_fast": {
            count: {what: round(one[what] / run[what], 3) for what in ("cells_seconds", "seconds")}
            for count, run in runs.items()
            if one and count > 1
        },
        "equal_metrics": {
            count: sum(first[name].metrics == record.metrics for name, record in found.items())
            for count, found in records.items()
        },
    }


def run_sweep(folder: Path, name: str, options: argparse.Namespace, count: int, flags: Sequence[str]) -> dict[str, Any]:
    """One command on so many GPUs: its exit code and seconds."""
    if options.executor == "ray":
        flags = [*flags, "--executor", "ray", "--address", "local", "--workers", str(count)]
    else:
        gpu = torch.cuda.is_available()
        flags = [*flags, "--devices", ",".join(str(number) if gpu else "cpu" for number in range(count))]
    program = [sys.executable, "-c", "from kvbench.cli import main; main()"]
    command = [*program, "sweep", str(folder / "scale.yaml"), "--output", str(folder / name), *flags]
    began = time.time()
    with (folder / f"{name}.txt").open("w") as file:
        code = subprocess.run(command, stderr=file, check=False).returncode
    if code:
        print((folder / f"{name}.txt").read_text()[-3000:], flush=True)
    return {"exit": code, "began": began, "seconds": round(time.time() - began, 1)}


def spans(records: dict[str, Record], ends: dict[str, float], began: float) -> dict[str, Any]:
    """From the command to its first cell, and from there until the last is done, by when each ended."""
    starts = [ends[name] - record.timings.get("seconds", 0.0) for name, record in records.items()]
    first = min(starts)
    return {
        "cells": len(records),
        "failed": sum(record.status != "done" for record in records.values()),
        "start_seconds": round(first - began, 1),
        "cells_seconds": round(max(ends.values()) - first, 1),
        "work_seconds": round(sum(record.timings.get("seconds", 0.0) for record in records.values()), 1),
        "model_load_seconds": sorted({r.timings["model_load_seconds"] for r in records.values() if r.status == "done"}),
    }


# ---- a model over two devices


def split(options: argparse.Namespace) -> dict[str, Any]:
    """By scheme: whether scores, answers and states are equal on one device and on two, and how fast each is."""
    shape = {**json.loads(options.shape.read_text()), "num_hidden_layers": options.layers}
    file = Path(tempfile.mkdtemp(prefix="gpus-")) / f"{options.shape.stem}-first-{options.layers}.json"
    file.write_text(json.dumps(shape))
    source = replace(catalog.resolve(str(file)), spread=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    every = placement.devices_of
    said: dict[str, list[Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for count in (1, 2):
        placement.devices_of = lambda where, count=count: some(every(where), count)  # type: ignore[misc]
        loaded = TransformersModel.load(source, "bfloat16" if device == "cuda" else "float32", device)
        for name in options.dtypes:
            runner = loaded.runner(Scheme.of(name), page_size=64)
            # one GPU's passes are longer, which changes last digits
            limits = runner.memory.limits
            runner.memory.limits = replace(limits, tokens=min(limits.tokens, options.pass_tokens))
            said.setdefault(name, []).append(answers(runner, shape["vocab_size"], options.prompt))
            row = found.setdefault(name, {})
            row[f"over_{count}"] = {"layers": [loaded.places.layers.count(d) for d in loaded.places.devices]}
            for what, call in timed(runner, shape["vocab_size"], options).items():
                tokens, seconds = call()
                row[f"over_{count}"][what] = round(tokens / seconds, 1)
            print(count, name, row[f"over_{count}"], flush=True)
            del runner
        del loaded
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    for name, (one, two) in said.items():
        found[name]["equal"] = {what: same(one[what], two[what]) for what in one}
    return {"shape": shape, "pass_tokens": options.pass_tokens, "schemes": found}


def some(both: tuple[list[torch.device], list[float]], count: int) -> tuple[list[torch.device], list[float]]:
    """The first so many; on a CPU stand-ins for them."""
    devices, room = both
    if devices[0].type == "cpu":
        return [torch.device("cpu", number) for number in range(count)], [1.0] * count
    return devices[:count], room[:count]


def draw(vocabulary: int, count: int, seed: int) -> tuple[int, ...]:
    """Random tokens."""
    ids = torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(ids)


def answers(runner: Any, vocabulary: int, prompt: int) -> dict[str, Any]:
    """What a runner says of a few prompts."""
    made = [GenerateRequest(draw(vocabulary, prompt // 4 + 50 * n, n), 24) for n in range(4)]
    scores = [ScoreRequest(draw(vocabulary, prompt - 40, 10 + n), draw(vocabulary, 40, 20 + n)) for n in range(4)]
    return {
        "scores": [score.logprobs for score in runner.score(scores)],
        "answers": [answer.tokens for answer in runner.generate(made)],
        "hidden_states": runner.hidden_states([draw(vocabulary, prompt, 30)]),
    }


def same(one: Sequence[Any], two: Sequence[Any]) -> dict[str, Any]:
    """Whether all are equal, and what differs at most."""
    if not isinstance(one[0], torch.Tensor):
        return {"equal": list(one) == list(two), "of": len(one)}
    largest = max(float((a.float() - b.float()).abs().max()) for a, b in zip(one, two, strict=True))
    return {"equal": all(map(torch.equal, one, two)), "of": sum(a.numel() for a in one), "largest_difference": largest}


def timed(runner: Any, vocabulary: int, options: argparse.Namespace) -> dict[str, Callable[[], tuple[int, float]]]:
    """Tokens and seconds of scoring many passes, and of decoding, each after a first time that is not counted."""

    def score() -> tuple[int, float]:
        requests = [
            ScoreRequest(draw(vocabulary, options.prompt - 8, n), draw(vocabulary, 8, n)) for n in range(options.many)
        ]
        runner.score(requests[:4])
        before = time.perf_counter()
        runner.score(requests)
        return options.many * options.prompt, time.perf_counter() - before

    def decode() -> tuple[int, float]:
        requests = [GenerateRequest(draw(vocabulary, options.prompt // 4, n), options.new) for n in range(8)]
        runner.generate(requests)
        before = runner.stats()
        runner.generate(requests)
        after = runner.stats()
        tokens, seconds = (after[f"decode_{what}"] - before[f"decode_{what}"] for what in ("tokens", "seconds"))
        return int(tokens), seconds

    return {"scoring_tokens_per_s": score, "decode_tokens_per_s": decode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("scale")
    one.set_defaults(run=scale)
    one.add_argument("output", type=Path)
    one.add_argument("--model", default="qwen2.5-coder-1.5b-instruct")
    one.add_argument("--gpus", type=lambda text: [int(n) for n in text.split(",")], default=[4, 1, 2])
    one.add_argument("--executor", choices=["ray", "process"], default="ray")
    one.add_argument("--set", default="{}", help="JSON laid over the sweep")
    two = verbs.add_parser("split")
    two.set_defaults(run=split)
    two.add_argument("output", type=Path)
    two.add_argument("--shape", type=Path, default=Path("configs/shapes/llama3-70b-50-layers.json"))
    two.add_argument("--layers", type=int, default=8)
    two.add_argument("--dtypes", nargs="+", default=["fp16", "int8", "int4", "int2"])
    two.add_argument("--pass-tokens", type=int, default=8192)
    two.add_argument("--prompt", type=int, default=4096, help="tokens of a prompt")
    two.add_argument("--many", type=int, default=32, help="prompts that are scored")
    two.add_argument("--new", type=int, default=64, help="tokens that are decoded")
    options = parser.parse_args()
    keep(options, options.run(options))
    print(options.output)


def keep(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Writes what was found, with the command and the machine."""
    # paths of this machine are left out
    told = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    row = {"command": " ".join(["python", "benchmarks/gpus.py", *told]), "environment": describe(), **found}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
