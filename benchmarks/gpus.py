"""One sweep on 1, 2 and more GPUs of a machine; and a model split over two beside the same layers on one.

`scale` runs a matrix by `--executor ray` (or `process`) on so many GPUs, each time into a new folder, and says how many
times faster the cells are done, and the whole command with what it takes to start. `--gpus 4,1+2`: on four, then on one
and at once on two others. `split` draws a shape's first layers on one GPU and on two, compares what both say to the
bit, and times them. `warm` compiles the kernels of either before, by several processes on one GPU. All write what they
have as they go.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
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
        {"task": "divergence", "tokens": 24576, "context": 2048},
        {"task": "needle", "contexts": [2048, 4096], "depths": 5, "per_cell": 6},
    ],
}
# of Qwen2.5-Coder-1.5B, whose kernels two layers with random weights take too
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "num_attention_heads": 12,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}


# ---- one sweep on several GPUs


def scale(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds by number of GPUs, and how often the numbers are those of the first run."""
    folder = Path(tempfile.mkdtemp(prefix="gpus-"))
    model = {"name": options.model, "gpus": options.share} if options.share < 1 else options.model
    config = {**SCALE, "model": model, **json.loads(options.set)}
    (folder / "scale.yaml").write_text(yaml.safe_dump(config))
    runs: dict[int, dict[str, Any]] = {}
    records: dict[int, dict[str, Record]] = {}
    for group in options.gpus:
        first, waiting = 0, {}
        with ThreadPoolExecutor(len(group)) as pool:
            for count in group:
                waiting[pool.submit(run_sweep, folder, options, count, first)] = count
                first += count
            for ended in as_completed(waiting):
                count = waiting[ended]
                store = Store(folder / str(count))
                records[count] = store.load().records
                # a record's own stamp is of a second; it is written as soon as its cell is done
                ends = {name: (store.cells / name / "record.json").stat().st_mtime for name in records[count]}
                run = ended.result()
                beside = [other for other in group if other != count]
                began = run.pop("began")
                runs[count] = {**run, "beside": beside, **spans(records[count], ends, began)}
                print(count, {key: value for key, value in runs[count].items() if key != "cells_at"}, flush=True)
                keep(options, compared(options, config, runs, records))  # of what is stopped, what was done is kept
    return compared(options, config, runs, records)


def compared(
    options: argparse.Namespace,
    config: dict[str, Any],
    runs: dict[int, dict[str, Any]],
    records: dict[int, dict[str, Record]],
) -> dict[str, Any]:
    """The runs beside each other."""
    first = records[next(iter(runs))]
    one = runs.get(1)
    return {
        "config": config,
        "executor": options.executor,
        "runs": runs,
        # of what was stopped nothing can be said
        "times_as_fast": {
            count: {what: round(one[what] / run[what], 3) for what in ("cells_seconds", "seconds")}
            for count, run in runs.items()
            if one and count > 1 and not one["exit"] and not run["exit"]
        },
        "equal_metrics": {
            count: sum(first[name].metrics == record.metrics for name, record in found.items() if name in first)
            for count, found in records.items()
        },
    }


def run_sweep(folder: Path, options: argparse.Namespace, count: int, first: int) -> dict[str, Any]:
    """One command on so many GPUs: its exit code, its seconds, and how many kernels were compiled meanwhile.

    first: how many GPUs others have before.
    """
    variables = dict(os.environ)
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[first : first + count])
    if options.executor == "ray":
        flags = ["--executor", "ray", "--address", options.address, "--workers", str(round(count / options.share))]
    else:
        seats = range(count) if torch.cuda.is_available() else ["cpu"] * count
        flags = ["--devices", ",".join(map(str, seats))]
    program = [sys.executable, "-c", "from kvbench.cli import main; main()"]
    command = [*program, "sweep", str(folder / "scale.yaml"), "--output", str(folder / str(count)), *flags]
    before, began = kernels_compiled(), time.time()
    with (folder / f"{count}.txt").open("w") as file, subprocess.Popen(command, stderr=file, env=variables) as process:
        try:
            code = process.wait(options.stop)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # what is done is kept
            code = process.wait(60)
    if code:
        print((folder / f"{count}.txt").read_text()[-3000:], flush=True)
    seconds = round(time.time() - began, 1)
    return {"exit": code, "began": began, "seconds": seconds, "kernels_compiled": kernels_compiled() - before}


def kernels_compiled() -> int:
    """How many Triton has kept on this machine."""
    folder = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton/cache"
    return sum(1 for _ in Path(folder).rglob("*.cubin"))


def spans(records: dict[str, Record], ends: dict[str, float], began: float) -> dict[str, Any]:
    """From the command to its first cell, and from there until the last is done, by when each ended.

    cells_at: of each cell, when it began and ended, in seconds from the first.
    """
    if not records:
        return {"cells": 0}
    took = {name: record.timings.get("seconds", 0.0) for name, record in records.items()}
    first, last = min(ends[name] - took[name] for name in records), max(ends.values())
    return {
        "cells": len(records),
        "failed": sum(record.status != "done" for record in records.values()),
        "start_seconds": round(first - began, 1),
        "cells_seconds": round(last - first, 1),
        "work_seconds": round(sum(took.values()), 1),
        "model_load_seconds": sorted({r.timings["model_load_seconds"] for r in records.values() if r.status == "done"}),
        "cells_at": {
            name: [round(ends[name] - took[name] - first, 2), round(ends[name] - first, 2)]
            for name in sorted(ends, key=lambda name: ends[name])
        },
    }


# ---- a model over two devices


def split(options: argparse.Namespace) -> dict[str, Any]:
    """By scheme: whether scores, answers and states are equal on one device and on two, and how fast each is."""
    shape = {**json.loads(options.shape.read_text()), "num_hidden_layers": options.layers}
    loaded = {count: first_layers(shape, options.shape.stem, count) for count in (1, 2)}
    found: dict[str, Any] = {"shape": shape, "pass_tokens": options.pass_tokens, "schemes": {}}
    for name in options.dtypes:
        row = found["schemes"][name] = {"scheme": Scheme.of(name).label}
        said = []
        for count, model in loaded.items():
            runner = model.runner(Scheme.of(name), page_size=64)
            # one GPU's passes are longer, which changes last digits
            limits = runner.memory.limits
            runner.memory.limits = replace(limits, tokens=min(limits.tokens, options.pass_tokens))
            said.append(answers(runner, shape["vocab_size"], options.prompt))
            places = model.places
            over = row[f"over_{count}"] = {
                "layers": [places.layers.count(device) for device in places.devices],
                "attention": runner.attention,
            }
            for what, call in timed(runner, shape["vocab_size"], options).items():
                tokens, seconds = call()
                over[what] = round(tokens / seconds, 1)
            del runner
            free()
        one, two = said
        row["equal"] = {what: same(one[what], two[what]) for what in one}
        print(name, json.dumps(row), flush=True)
        keep(options, found)  # of what is stopped, what was done is kept
    return found


def first_layers(shape: dict[str, Any], name: str, count: int) -> TransformersModel:
    """A shape with random weights, drawn layer by layer, on the first so many devices."""
    file = Path(tempfile.mkdtemp(prefix="gpus-")) / f"{name}-first-{shape['num_hidden_layers']}.json"
    file.write_text(json.dumps(shape))
    source = replace(catalog.resolve(str(file)), spread=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    every = placement.devices_of

    def some(where: str) -> tuple[list[torch.device], list[float]]:
        # on a CPU stand-ins; the other model is on one of them, and changes no share
        devices = every(where)[0] if device == "cuda" else [torch.device("cpu", number) for number in range(count)]
        return devices[:count], [1.0] * count

    placement.devices_of = some
    try:
        return TransformersModel.load(source, "bfloat16" if device == "cuda" else "float32", device)
    finally:
        placement.devices_of = every


def free() -> None:
    """What no one has any more is free on the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


# ---- kernels before a clock runs


def warm(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each of several processes, which share out the schemes and run each on two layers."""
    shape = json.loads(options.shape.read_text()) if options.shape else SHAPE
    asked = options.dtypes or [
        {"dtype": dtype, "rotation": rotation} if isinstance(dtype, str) else {**dtype, "rotation": rotation}
        for dtype in SCALE["dtypes"]
        for rotation in SCALE["rotations"]
    ]
    before, began = kernels_compiled(), time.time()
    context = multiprocessing.get_context("spawn")
    seats = [
        context.Process(target=exercise, args=({**shape, "num_hidden_layers": 2}, asked[n :: options.seats], options))
        for n in range(min(options.seats, len(asked)))
    ]
    for seat in seats:
        seat.start()
    for seat in seats:
        seat.join()
    return {
        "exit": [seat.exitcode for seat in seats],
        "seconds": round(time.time() - began, 1),
        "kernels_compiled": kernels_compiled() - before,
    }


def exercise(shape: dict[str, Any], asked: Sequence[Any], options: argparse.Namespace) -> None:
    """Runs each scheme once, in the sizes of `scale` and `split`. In a process of its own, with its share of memory."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(options.memory / options.seats)
    model = first_layers(shape, "warm", 1)
    for scheme in asked:
        began = time.perf_counter()
        runner = model.runner(Scheme.of(scheme), page_size=64)
        answers(runner, shape["vocab_size"], options.prompt)
        text = draw(shape["vocab_size"], options.prompt, 1)
        lengths = [options.prompt // (1 + n % 2) - 16 for n in range(options.many)]
        runner.generate([GenerateRequest((*text[:length], n), 16) for n, length in enumerate(lengths)])
        runner.hidden_states([draw(shape["vocab_size"], options.prompt // 2, n) for n in range(12)])
        print(f"{Scheme.of(scheme).label}: {time.perf_counter() - began:.1f} s", flush=True)
        del runner
        free()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("scale")
    one.set_defaults(run=scale)
    one.add_argument("output", type=Path)
    one.add_argument("--model", default="qwen2.5-coder-1.5b-instruct")
    one.add_argument(
        "--gpus", type=groups, default="4,1+2", help="how many, by and by; 1+2: at once, beside each other"
    )
    one.add_argument("--executor", choices=["ray", "process"], default="ray")
    one.add_argument("--address", default="local", help="of a cluster with these GPUs; local: one is started each time")
    one.add_argument("--share", type=float, default=1.0, help="of a GPU that each of Ray's workers takes")
    one.add_argument("--set", default="{}", help="JSON laid over the sweep")
    one.add_argument("--stop", type=float, help="seconds after which a run is stopped")
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
    three = verbs.add_parser("warm")
    three.set_defaults(run=warm)
    three.add_argument("output", type=Path)
    three.add_argument("--shape", type=Path, help="of split's; without one that of scale's model")
    three.add_argument("--dtypes", nargs="+", help="without any, those of scale")
    three.add_argument("--seats", type=int, default=8, help="processes on the one GPU")
    three.add_argument("--memory", type=float, default=0.9, help="of the GPU that they take in all")
    three.add_argument("--prompt", type=int, default=4096, help="tokens of a prompt")
    three.add_argument("--many", type=int, default=60, help="prompts at once")
    options = parser.parse_args()
    keep(options, options.run(options))
    print(options.output)


def groups(text: str) -> list[list[int]]:
    """`4,1+2` as [[4], [1, 2]]."""
    return [[int(count) for count in group.split("+")] for group in text.split(",")]


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
