"""What it costs to run 10 000 cells on 64 workers: milliseconds a cell, and how much longer than without that.

The workers are simulated: a cell of the toy backend (tests/sweep/toy.py) takes them a time of a virtual clock, drawn
with a seed. All that the parent does is real, and its seconds pass on that clock too, in which the workers go on: it
chooses cells, writes records with their samples through to the disk and shows them. Then the folder is planned, resumed
and reported.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import importlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import kvbench.sweep.command as command
import kvbench.sweep.session as session
from kvbench.environment import describe
from kvbench.sweep.command import Options, prepare, run_sweep
from kvbench.sweep.executors.pool import Died, Queue, Seat, share_out
from kvbench.sweep.job import Event, Job, Tell
from kvbench.sweep.plan import Cell
from kvbench.sweep.session import Bench
from kvbench.sweep.spec import ModelSpec

sys.path.append(str(Path(__file__).parents[1] / "tests/sweep"))
toy = importlib.import_module("toy")

DTYPES = ["int8", "int4", "int2", "fp8_per_tensor", "fp8_per_token_head"]
ROTATIONS = ["none", "hadamard"]

# the command over the toys; what they import is imported as `kvbench plan` imports it
COMMAND = f"""
import sys
sys.path.append({toy.__file__.removesuffix("toy.py")!r})
from kvbench.cli.shared import uncollected
with uncollected():
    import toy
toy.kvbench(sys.argv[1:])
"""


class Simulated:
    """An executor, and the pool of its workers, which measure by themselves and take their time of a virtual clock."""

    device = device_name = "cpu"

    def __init__(self, workers: int, seconds: float) -> None:
        self._seats = [Seat(number, node=f"node {number // 8}") for number in range(workers)]
        self.mean = seconds
        self.random = random.Random(0)
        self.now = self.asked = self.busy = self.idle = self.processor = self.used = 0.0
        self.ended: dict[int, float] = {}  # by seat: when its last cell was done
        self.benches: dict[str, Bench] = {}
        self.ends: list[tuple[float, int]] = []
        self.durations: list[float] = []

    def gpus(self, spec: ModelSpec) -> int:
        """See Executor."""
        return 0

    def missing(self, cells: Sequence[Cell]) -> list[str]:
        """See Executor."""
        return []

    def run(self, cells: Sequence[Cell], job: Job, tell: Tell) -> None:
        """See Executor."""
        self.job = job
        self._ask()
        share_out(self, cells, job, tell, tries=3)
        self._pass()

    def _pass(self) -> None:
        """The parent's seconds since it was last asked pass on the virtual clock too."""
        spent = time.perf_counter() - self.asked
        self.now, self.busy = self.now + spent, self.busy + spent
        self.processor += time.process_time() - self.used
        self._ask()

    def _ask(self) -> None:
        """From here on the time is the parent's."""
        self.asked, self.used = time.perf_counter(), time.process_time()

    def seats(self, queue: Queue) -> Sequence[Seat]:
        """See Pool."""
        return self._seats

    def give(self, seat: Seat, cell: Cell) -> None:
        """See Pool."""
        self._pass()
        self.idle += self.now - self.ended.get(seat.number, self.now)
        self.durations.append(self.mean * self.random.uniform(0.2, 1.8))
        heapq.heappush(self.ends, (self.now + self.durations[-1], seat.number))

    def wait(self) -> Iterable[tuple[Seat, Event | Died | Exception]]:
        """See Pool."""
        self._pass()
        end, number = heapq.heappop(self.ends)
        self.now = max(self.now, end)
        seat = self._seats[number]
        assert seat.cell is not None
        self.ended[number] = end
        model = seat.cell.model.name
        if model not in self.benches:
            self.benches[model] = Bench(self.job, lambda step: None)
        finished = self.benches[model].run(seat.cell)  # the worker's work, which is not the parent's
        self._ask()
        yield seat, finished

    def replace(self, seat: Seat) -> None:
        """See Pool."""

    def end(self) -> None:
        """See Pool."""


def timed(*arguments: str) -> dict[str, float]:
    """Seconds, those of the processor alone, and peak memory of a command over the toys."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.decode()[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "processor_seconds": round(processor, 2),
        "peak_bytes_so_far": after.ru_maxrss * 1024,
    }


def main() -> None:
    """Prints the figures, and writes them where it is told to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="write executors.json there")
    parser.add_argument("--plans", type=int, default=0, help="so many times `kvbench plan` alone, into plan.json")
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=17.0, help="a cell's mean, as in results/qwen on an H100")
    options = parser.parse_args()
    os.environ["COLUMNS"] = "200"
    command.default_device = lambda: "cpu"
    with tempfile.TemporaryDirectory(prefix="kvbench-executors-") as name:
        shape: dict[str, Any] = {"model": None, "models": ["toy", "other"], "dtypes": DTYPES, "rotations": ROTATIONS}
        a_task = len(
            prepare(toy.write_config(Path(name, "one.yaml"), tasks=["toy_0"], **shape), Options(), toy.PARTS).cells
        )
        tasks = [f"toy_{number}" for number in range(-(-options.cells // a_task))]
        config, folder = toy.write_config(Path(name, "toys.yaml"), tasks=tasks, **shape), Path(name, "run")
        if options.plans:
            keep(options, "plan", {"plan": [timed("plan", str(config)) for _ in range(options.plans)]})
            return
        began = time.perf_counter()
        count = len(prepare(config, Options(output=folder), toy.PARTS).cells)
        laid_out = time.perf_counter() - began
        executor = Simulated(options.workers, options.seconds)
        command.make_executor = lambda *_: executor
        session.clear_garbage = lambda: None  # of the worker's own process
        with Path(name, "stderr").open("w") as lines, contextlib.redirect_stderr(lines):
            code = run_sweep(config, Options(output=folder), toy.PARTS)
        ideal = sum(executor.durations) / options.workers
        found = {
            "cells": count,
            "workers": options.workers,
            "mean_cell_seconds": options.seconds,
            "exit_code": code,
            "worker_waits_ms_a_cell": round(1000 * executor.idle / count, 2),
            "parent_ms_a_cell": round(1000 * executor.busy / count, 2),
            "parent_processor_ms_a_cell": round(1000 * executor.processor / count, 2),
            "virtual_seconds": round(executor.now, 1),
            "ideal_seconds": round(ideal, 1),
            "overhead_percent": round(100 * (executor.now / ideal - 1), 2),
            "laid_out_seconds": round(laid_out, 2),
            "plan": timed("plan", str(config), "--output", str(folder.with_name("none"))),
            "resume": timed("sweep", str(config), "--output", str(folder)),
            "report": timed("report", str(folder)),
        }
        keep(options, "executors", found)


def keep(options: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    """Prints what was found, and writes it with the command and the machine where it is told to."""
    row = {
        "command": " ".join(["python", "benchmarks/executors.py", *sys.argv[1:]]),
        "load_of_the_machine": [round(one, 1) for one in os.getloadavg()],
        **found,
        "environment": describe(),
    }
    print("\n".join(f"{key:20} {value}" for key, value in row.items() if key != "environment"))
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
        Path(options.folder, f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
