"""Seconds of whole tasks on one GPU: kvbench's cells against lm-eval's HFLM on the same model in the same run.

HFLM is at batch 64 (128 for gsm8k) with torch's SDPA, under lm-eval as it is: templates are compiled for each document.
"in the model" leaves out lm-eval's own work: prompts, metrics, bootstrap. Every cell runs twice and the second counts,
after kernels are compiled. The data is the offline mirror's (`--data`, or KVBENCH_DATA).
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
from kvbench.runners import models
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.tasks import RunContext, make_task
from kvbench.tasks.runner_lm import RunnerLM

TASKS: tuple[tuple[dict[str, Any], int], ...] = (
    ({"task": "arc_easy"}, 64),
    ({"task": "piqa"}, 64),
    ({"task": "lambada_openai"}, 64),
    ({"task": "gsm8k", "num_fewshot": 5, "limit": 256}, 128),
)
SCHEMES = ("fp16", "int8", "int4", "int2")
PARITY_DOCUMENTS = 200


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


def run(task: Any, runner: Any, kind: type = RunnerLM) -> tuple[dict[str, Any], Any]:
    """Seconds of a whole task, and what came of it."""
    with timed(kind) as spent:
        begin = time.perf_counter()
        outcome = task.run(runner, RunContext(lambda *_: {}, lambda *_: None))
        seconds = time.perf_counter() - begin
    row: dict[str, Any] = {"seconds": seconds, "model_seconds": sum(spent)}
    row["metrics"] = {metric.name: metric.value for metric in outcome.metrics}
    return row, outcome


def runner_of(loaded: TransformersModel, text: str) -> Any:
    """A runner of DTYPE or DTYPE/ROTATION."""
    dtype, _, rotation = text.partition("/")
    return loaded.runner(Scheme.parse(dtype, rotation or None))


def apart(ours: Any, theirs: Any) -> str:
    """Largest difference of a log-likelihood, or how many texts are equal."""
    pairs = list(zip(ours.samples, theirs.samples, strict=True))
    if "logprobs" in ours.samples[0]:
        largest = max(abs(x - y) for a, b in pairs for x, y in zip(a["logprobs"], b["logprobs"], strict=True))
        metric = next(name for name in ("acc", "exact_match") if name in ours.samples[0])
        return f"|Δ log-likelihood| {largest:.1e}, {sum(a[metric] != b[metric] for a, b in pairs)} flips"
    return f"{sum(a['resps'] == b['resps'] for a, b in pairs)}/{len(pairs)} texts equal"


def main() -> None:
    """Times both, and prints them side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("KVBENCH_DATA"), help="the offline mirror's folder")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    options = parser.parse_args()
    if options.data is None:
        sys.exit("error: no data: name the offline mirror's folder with --data or KVBENCH_DATA")
    if not torch.cuda.is_available():
        sys.exit("error: no GPU: benchmarks/scoring.py is the one for CPUs")
    logging.disable(logging.WARNING)
    source = models.resolve(options.model)
    rows: list[dict[str, Any]] = []

    def show(**row: Any) -> None:
        rows.append(row)
        ratio = f"{row['ratio']:6.2f} ×" if row.get("ratio") else " " * 8
        in_model = f"{row['model_ratio']:6.2f} ×" if row.get("model_ratio") else " " * 8
        print(
            f"{row['dtype']:<9} {row['task']:<15} {row['cell']:<26} {row['seconds']:7.2f} s {ratio}"
            f"  in the model {row['model_seconds']:6.2f} s {in_model}  {row.get('apart', '')}",
            flush=True,
        )

    for dtype in ("bfloat16", "float32"):
        loaded = TransformersModel.load(source, dtype, "cuda")  # type: ignore[arg-type]
        sdpa = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=64, device="cuda")
        sdpa.truncated = 0  # what our own model class counts
        for spec, batch_size in TASKS:
            cut = {**spec, "limit": PARITY_DOCUMENTS} if dtype == "float32" else spec
            if dtype == "float32" and spec["task"] == "gsm8k":
                continue
            task = make_task(cut, options.data)
            loaded.model.set_attn_implementation("sdpa")
            sdpa.batch_size_per_gpu = batch_size
            with (
                mock.patch("kvbench.tasks.runner_lm.RunnerLM", return_value=sdpa),
                mock.patch("kvbench.tasks.lm_eval._compiled_once", nullcontext),
            ):
                theirs, their_outcome = run(task, runner_of(loaded, "auto"), HFLM)
            show(dtype=dtype, task=task.name, cell=f"HFLM batch {batch_size}", **theirs)
            fp16: dict[str, Any] = {}
            for scheme in SCHEMES if dtype == "bfloat16" else ("auto",):
                first, _ = run(task, runner_of(loaded, scheme))
                again, outcome = run(task, runner_of(loaded, scheme))
                base = fp16 or theirs
                note = apart(outcome, their_outcome) if not fp16 else ""
                show(
                    dtype=dtype,
                    task=task.name,
                    cell=scheme,
                    **again,
                    first_seconds=first["seconds"],
                    ratio=base["seconds"] / again["seconds"],
                    model_ratio=base["model_seconds"] / again["model_seconds"],
                    apart=note,
                )
                fp16 = fp16 or again
        del loaded, sdpa
    if options.output:
        environment = {**describe(), "command": "benchmarks/engine.py"}
        options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
