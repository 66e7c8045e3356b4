"""Seconds of whole tasks on one GPU: kvbench's cells against lm-eval's HFLM on the same model in the same run.

HFLM is at batch 64 (128 for gsm8k), or at each of `--batch-size`, of which the fastest counts, with torch's SDPA, under
lm-eval as it is: templates are compiled for each document. It runs a task first, so it loads it and makes its prompts,
which kvbench's cells find made, as all but the first of a sweep do. A cell runs six times: the first compiles kernels
and makes tokens, and of the others the median counts. All cells run once before one runs again, so that a state of the
machine that lasts for seconds is none of a single cell's; a cell that is named twice is an A/A cell.
"in the model" leaves out lm-eval's own work: prompts, metrics, bootstrap. How near the scores are is for
benchmarks/parity.py. The data is the offline mirror's (`--data`, or KVBENCH_DATA).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lm_eval.models.huggingface import HFLM

from kvbench.environment import describe
from kvbench.runners import catalog
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.sweep.session import clear_garbage
from kvbench.tasks import RunContext, make_task
from kvbench.tasks.lm_eval import _load
from kvbench.tasks.runner_lm import RunnerLM

TASKS: tuple[tuple[dict[str, Any], int], ...] = (
    ({"task": "arc_easy"}, 64),
    ({"task": "piqa"}, 64),
    ({"task": "lambada_openai"}, 64),
    ({"task": "gsm8k", "num_fewshot": 5, "limit": 256}, 128),
)
SCHEMES = ("fp16", "int8", "int4", "int2")
REPEATS = 5


@contextmanager
def timed(kind: type) -> Iterator[list[float]]:
    """Seconds spent in the model class's own work inside the block."""
    spent: list[float] = []

    def around(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            found = method(*args, **kwargs)
            spent.append(time.perf_counter() - begin)
            return found

        return call

    names = ("_loglikelihood_tokens", "generate_until")
    with mock.patch.multiple(kind, **{name: around(getattr(kind, name)) for name in names}):
        yield spent


def run(task: Any, runner: Any, kind: type = RunnerLM) -> dict[str, Any]:
    """Seconds of a whole task, and its metrics."""
    clear_garbage()  # as before each cell of a sweep
    with timed(kind) as spent:
        begin = time.perf_counter()
        outcome = task.run(runner, RunContext(lambda *_: {}, lambda *_: None))
        seconds = time.perf_counter() - begin
    metrics = {metric.name: metric.value for metric in outcome.metrics}
    return {"seconds": seconds, "model_seconds": sum(spent), "metrics": metrics}


def runner_of(loaded: TransformersModel, text: str) -> Any:
    """A runner of DTYPE or DTYPE/ROTATION."""
    dtype, _, rotation = text.partition("/")
    return loaded.runner(Scheme.parse(dtype, rotation or None))


def main() -> None:
    """Times both, and prints them side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("KVBENCH_DATA"), help="the offline mirror's folder")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    names = [str(spec["task"]) for spec, _ in TASKS]
    parser.add_argument("--task", action="append", choices=names, help="all four when not given; repeatable")
    parser.add_argument("--cell", action="append", choices=SCHEMES, help="all when not given; the first is compared")
    parser.add_argument("--batch-size", action="append", type=int, help="HFLM's; repeatable")
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    options = parser.parse_args()
    if options.data is None:
        sys.exit("error: no data: name the offline mirror's folder with --data or KVBENCH_DATA")
    if not torch.cuda.is_available():
        sys.exit("error: no GPU: benchmarks/scoring.py is the one for CPUs")
    asked = [f"--{name} {value}" for name in ("task", "cell") for value in getattr(options, name) or ()]
    asked += [f"--batch-size {size}" for size in options.batch_size or ()]
    asked += [f"--model {options.model}"]
    logging.disable(logging.WARNING)
    source = catalog.resolve(options.model)
    rows: list[dict[str, Any]] = []

    def show(**row: Any) -> None:
        rows.append(row)
        ratio = f"{row['ratio']:6.2f} ×" if row.get("ratio") else " " * 8
        in_model = f"{row['model_ratio']:6.2f} ×" if row.get("model_ratio") else " " * 8
        print(
            f"{row['task']:<15} {row['cell']:<26} {row['seconds']:7.2f} s {ratio}"
            f"  in the model {row['model_seconds']:6.2f} s {in_model}",
            flush=True,
        )

    loaded = TransformersModel.load(source, "bfloat16", "cuda")
    sdpa = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=64, device="cuda")
    sdpa.truncated = 0  # what our own model class counts
    for spec, batch_size in (one for one in TASKS if one[0]["task"] in (options.task or names)):
        task = make_task(spec, options.data)
        theirs: dict[str, Any] = {}
        for size in options.batch_size or [batch_size]:
            loaded.model.set_attn_implementation("sdpa")
            sdpa.batch_size_per_gpu = size
            _load.cache_clear()  # each loads the task and makes its prompts
            with (
                mock.patch("kvbench.tasks.runner_lm.RunnerLM", return_value=sdpa),
                mock.patch("kvbench.tasks.lm_eval._compiled_once", nullcontext),
            ):
                try:
                    own = run(task, runner_of(loaded, "auto"), HFLM)
                except torch.OutOfMemoryError:
                    print(f"{task.name} HFLM batch {size}: out of memory", flush=True)
                    continue
            show(task=task.name, cell=f"HFLM batch {size}", **own)
            theirs = own if not theirs or own["seconds"] < theirs["seconds"] else theirs
        cells = options.cell or SCHEMES
        firsts = [run(task, runner_of(loaded, cell)) for cell in cells]
        # in turn, so that what changes about the machine meets all of them
        rounds = [[run(task, runner_of(loaded, cell)) for cell in cells] for _ in range(REPEATS)]
        columns = list(zip(*rounds, strict=True))
        middles = [sorted(column, key=lambda row: row["seconds"])[REPEATS // 2] for column in columns]
        for i, (cell, first, column, middle) in enumerate(zip(cells, firsts, columns, middles, strict=True)):
            base = middles[0] if i else theirs
            show(
                task=task.name,
                cell=cell,
                **middle,
                first_seconds=first["seconds"],
                all_seconds=[row["seconds"] for row in column],
                all_model_seconds=[row["model_seconds"] for row in column],
                ratio=base["seconds"] / middle["seconds"],
                model_ratio=base["model_seconds"] / middle["model_seconds"],
            )
        if options.output:
            environment = {**describe(), "command": " ".join(["benchmarks/engine.py", *asked])}
            options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
