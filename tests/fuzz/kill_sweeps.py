"""Killed sweeps: SIGKILL at any moment loses no finished cell, and the same command ends with the same tables."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from campaign import Broken, Case, toy_sweeps

from kvbench.report.tables import Report
from kvbench.results import Store
from kvbench.sweep.command import Options, run_sweep

KILLS = 3  # of one folder, one after the other
TASKS = [{"task": f"toy_{i}", "seconds": 0.005} for i in range(3)]


def _start(config: Path, output: Path, parts: Any) -> Any:
    """The sweep in a process of its own; torch is there already, so it starts at once."""

    def ran() -> None:
        os.setpgrp()
        sys.stderr = sys.stdout = io.StringIO()
        os._exit(run_sweep(config, Options(output=output), parts))

    process = multiprocessing.get_context("fork").Process(target=ran)
    process.start()
    return process


def _finish(config: Path, output: Path, parts: Any) -> float:
    """Seconds until the sweep is done."""
    start = time.perf_counter()
    process = _start(config, output, parts)
    process.join(60)
    if process.exitcode != 0:
        process.kill()
        raise Broken("sweep that does not end", f"exit {process.exitcode}")
    return time.perf_counter() - start


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    """Kills of a toy sweep, of which every third begins anew and the others go on with what was left."""
    toy = toy_sweeps()
    config = toy.write_config(folder / "killed.yaml", tasks=TASKS)
    seconds = _finish(config, folder / "alone", toy.PARTS)
    table = Report.read(folder / "alone").rows()
    for number in range(count):
        if number % KILLS == 0:
            shutil.rmtree(folder / "killed", ignore_errors=True)
        # in what a sweep that goes on has left, the moment is earlier
        moment = random.Random(f"{seed}/{number}").uniform(0, seconds / (1 + number % KILLS))
        run = partial(killed, config, folder / "killed", toy.PARTS, moment, table)
        yield Case(f"kill {seed}/{number} after {moment:.3f} s", run)


def killed(config: Path, output: Path, parts: Any, moment: float, table: str) -> str:
    """The outcome of a kill, and of a copy of what is left once the same command has finished it."""
    before = set(Store(output).load().records)
    process = _start(config, output, parts)
    time.sleep(moment)
    process.kill()
    process.join()
    now = Store(output).load()
    if now.problems:
        raise Broken("half a cell", "\n".join(now.problems))
    if lost := before - set(now.records):
        raise Broken("lost cell", ", ".join(sorted(lost)))
    whole = output.with_name("resumed")
    shutil.rmtree(whole, ignore_errors=True)
    if output.exists():
        shutil.copytree(output, whole)
    _finish(config, whole, parts)
    if Report.read(whole).rows() != table:
        raise Broken("difference", str(Report.read(whole).rows())[:2000])
    if process.exitcode != -signal.SIGKILL:
        return "ended before its kill"
    return "killed with cells done, resumed" if now.records else "killed before the first cell, resumed"
