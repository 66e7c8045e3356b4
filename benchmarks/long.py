"""Many long requests at once on one GPU: seconds of prompts and milliseconds a decode step, by cache, and by kernel.

A model's shape with random weights answers `--requests` prompts of `--prompt` random tokens. All are decoded together:
pages may take most of the memory. What a step's kernels take comes from a profile of a second run of the first cell and
of `--profile`. Prompts are computed in passes of as many tokens as in a sweep.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvbench.environment import describe
from kvbench.runners import catalog
from kvbench.runners.base import GenerateRequest
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.sweep.session import clear_garbage
from kvbench.timing.spans import Span, alone, spans

GPU = torch.cuda.is_available()
COUNTED = ("prefill_tokens", "prefill_seconds", "decode_tokens", "decode_seconds")
# what a kernel does, by a part of its name
GROUPS = {
    "attention": ("_decode_kernel", "merge_kernel", "_prefill_kernel", "_spread_kernel", "_rotate_kernel"),
    "writes to the cache": ("_store_kernel",),
    "matrix products": ("nvjet", "gemm", "splitKreduce", "cutlass"),
}


def requests(vocabulary: int, count: int, prompt: int, new: int, seed: str) -> list[GenerateRequest]:
    """Prompts of random tokens."""
    draw = random.Random(seed)
    return [GenerateRequest(tuple(draw.randrange(vocabulary) for _ in range(prompt)), new) for _ in range(count)]


def counted(runner: Any, asked: list[GenerateRequest]) -> dict[str, float]:
    """Seconds in all, and what the runner counts of prompts and decoding."""
    before, began = runner.stats(), time.perf_counter()
    runner.generate(asked)
    seconds, after = time.perf_counter() - began, runner.stats()
    return {"seconds": seconds, **{name: after.get(name, 0) - before.get(name, 0) for name in COUNTED}}


def by_group(found: list[Span]) -> dict[str, float]:
    """Seconds in which the GPU works, by what its kernels do; what runs beside another kernel counts once."""
    made: Counter[str] = Counter()
    for span, own in zip(found, alone(found), strict=True):
        names = (group for group, parts in GROUPS.items() if any(part in span.name for part in parts))
        made[next(names, "other layers' arithmetic")] += own / 1e6
    return dict(made)


def step_groups(runner: Any, asked: list[GenerateRequest], step: float) -> dict[str, float]:
    """Milliseconds of one decode step, by what its kernels do: the mean of the last ones of a profiled run."""
    found, steps = spans(lambda: runner.generate(asked)), 8
    last = max(span.end for span in found)
    own = [span for span in found if span.begin > last - steps * step * 1e6]
    return {group: 1e3 * seconds / steps for group, seconds in by_group(own).items()}


def main() -> None:
    """Prints a row a cache."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="configs/shapes/qwen3-8b.json")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--new", type=int, default=65)
    parser.add_argument("--cell", action="append", help="DTYPE; fp16, int4, int2 and int8 when not given")
    parser.add_argument("--profile", default="int4", help="a cell whose kernels are told beside the first one's")
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    options = parser.parse_args()
    device, dtype = ("cuda", "bfloat16") if GPU else ("cpu", "float32")
    environment = {
        **describe(),
        "command": f"benchmarks/long.py --requests {options.requests} --prompt {options.prompt}",
    }
    loaded = TransformersModel.load(catalog.resolve(options.model), dtype, device)  # type: ignore[arg-type]
    sizes = (len(loaded.tokenizer), options.requests, options.prompt)
    rows: list[dict[str, Any]] = []
    for cell in options.cell or ["fp16", "int4", "int2", "int8"]:
        clear_garbage()
        runner = loaded.runner(Scheme.parse(cell), page_size=64)
        runner.memory.limits = replace(runner.memory.limits, memory=0.85 if GPU else 0.0)
        runner.generate(requests(sizes[0], 1, options.prompt, 6, "first"))  # compiles
        row: dict[str, Any] = {"cell": cell, **counted(runner, requests(*sizes, options.new, "timed"))}
        # of random weights some answers end early, and their rows go on idle
        row["step_ms"] = 1e3 * row["decode_seconds"] / (options.new - 1)
        first = rows[0] if rows else row
        row["decode_ratio"] = first["step_ms"] / row["step_ms"]
        row["ratio"] = first["seconds"] / row["seconds"]
        if GPU and cell in (first["cell"], options.profile):
            row["step_ms_of"] = step_groups(runner, requests(*sizes, 20, "profiled"), row["step_ms"] / 1e3)
        rows.append(row)
        of = ", ".join(f"{name} {ms:.2f}" for name, ms in row.get("step_ms_of", {}).items())
        print(
            f"{cell:<6} {row['seconds']:7.2f} s {row['ratio']:5.2f} ×  prompts {row['prefill_seconds']:6.2f} s  "
            f"a step {row['step_ms']:6.2f} ms {row['decode_ratio']:5.2f} ×  {of}",
            flush=True,
        )
        if options.output:
            options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
        runner.memory.release()
        del runner
        if GPU:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
