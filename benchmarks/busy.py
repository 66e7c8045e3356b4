"""How much of a scoring task's time in the model a GPU works, by cache.

A task's requests are scored once to compile, five times to time, and once under torch.profiler, whose kernels' spans
give the seconds in which the GPU works; what runs beside another kernel counts once. A loop that is always the same
says how fast the host was meanwhile, which has to launch in time. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from kvbench.environment import describe
from kvbench.runners import catalog
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.sweep.session import clear_garbage
from kvbench.tasks import RunContext, make_task
from kvbench.timing.spans import alone, spans


class _AskedError(Exception):
    """Raised in place of an answer, with the requests."""


def requests_of(task: Any, runner: Any) -> Any:
    """All that a task asks to be scored."""

    def asked(requests: Any, *_: Any) -> None:
        raise _AskedError(requests)

    with mock.patch.object(runner, "score", asked):
        try:
            task.run(runner, RunContext(lambda *_: {}, lambda *_: None))
        except _AskedError as error:
            found: Any = error.args[0]
            return found
    raise ValueError(f"{task.name} asks for no score")


def scored(runner: Any, requests: Any) -> float:
    """Seconds until the GPU has done it."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    runner.score(requests)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def host_seconds() -> float:
    """Of a fixed loop of one thread: a host with other work takes up to twice as long."""
    began, total = time.perf_counter(), 0
    for i in range(3_000_000):
        total += i & 7
    return time.perf_counter() - began


def busy(runner: Any, requests: Any) -> tuple[float, int]:
    """Seconds in which the GPU works, and its launches."""
    found = spans(lambda: scored(runner, requests))
    return sum(alone(found)) / 1e6, len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--task", action="append", help="may be repeated; default: arc_easy and piqa")
    parser.add_argument("--output", type=Path, help="a JSON record")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("not run: there is no GPU here to time on")
        return
    loaded = TransformersModel.load(catalog.resolve(options.model), "bfloat16", "cuda")
    data = Path(os.environ["KVBENCH_DATA"]) if "KVBENCH_DATA" in os.environ else None
    rows = []
    for name in options.task or ["arc_easy", "piqa"]:
        task = make_task({"task": name}, data)
        for cell in ("fp16", "int8", "int4"):
            clear_garbage()
            runner = loaded.runner(Scheme.parse(cell))
            requests = requests_of(task, runner)
            scored(runner, requests)
            host = [host_seconds()]
            walls = sorted(scored(runner, requests) for _ in range(5))
            host.append(host_seconds())
            works, launches = busy(runner, requests)
            row = {"task": name, "cell": cell, "requests": len(requests), "walls": walls, "wall": median(walls)}
            rows.append(row | {"busy": works, "share": works / median(walls), "launches": launches, "host": host})
            share = 100 * works / median(walls)
            print(
                f"{name} {cell}: {median(walls):.3f} s, of which the GPU works {works:.3f} ({share:.0f} %); a loop "
                f"on the host {host[0]:.2f} and {host[1]:.2f} s",
                flush=True,
            )
            if options.output:  # of what is stopped, what was done is kept
                options.output.write_text(json.dumps({"environment": describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
