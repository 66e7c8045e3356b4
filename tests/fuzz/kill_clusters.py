"""Kills in a Ray cluster: workers, nodes and drivers of toy sweeps, which must end with the table of one left alone."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from campaign import Broken, toy_sweeps

from kvbench.report.tables import Report
from kvbench.results import Store

TASKS, SECONDS = 6, 0.3  # of a cell; 8 cells a task
NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}
KINDS = ("worker", "node", "driver")
PATIENCE = 300.0  # seconds until a sweep that goes on must be done


@dataclass
class Found:
    """What happened: kills by kind, sweeps, cells, and how often a cell was begun."""

    kills: Counter[str] = field(default_factory=Counter)
    sweeps: int = 0
    cells: int = 0
    begun: int = 0
    seconds: float = 0.0


def start_cluster(toys: Path, cpus: int = 1) -> Any:
    """A cluster of this machine that is a head alone, whose processes know the toys in that folder."""
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(toys), os.environ.get("PYTHONPATH")]))
    # a killed node is missed after 1 s, and not 15; a slow one has its 10 s to answer as ever
    health = {"initial_delay_ms": 500, "period_ms": 500, "failure_threshold": 2}
    head = {
        **NODE,
        "num_cpus": cpus,
        "include_dashboard": False,
        "include_log_monitor": False,
        "_system_config": {f"health_check_{name}": value for name, value in health.items()},
    }
    return Cluster(initialize_head=True, head_node_args=head)


def check(store: Store, before: dict[str, str]) -> dict[str, str]:
    """When each cell was finished; all that were before still are, as they were.

    Raises:
        Broken: a cell is half there, lost, doubled or failed.
    """
    contents = store.load()
    if contents.problems:
        raise Broken("half a cell", "\n".join(contents.problems))
    now = {name: record.finished + str(record.timings) for name, record in contents.records.items()}
    if lost := before.keys() - now.keys():
        raise Broken("lost cell", ", ".join(sorted(lost)))
    if twice := [name for name in before if before[name] != now[name]]:
        raise Broken("doubled cell", ", ".join(twice))
    if failed := [record.error for record in contents.records.values() if record.status == "failed"]:
        raise Broken("failed cell", str(failed))
    return now


def compare(output: Path, folder: Path, toy: Any, tasks: Sequence[str]) -> None:
    """Raises Broken where the table is not that of a sweep in this process that nobody disturbed, kept in a folder."""
    from kvbench.sweep.command import Options, run_sweep

    alone = folder / "alone"
    if not alone.exists():
        config = toy.write_config(folder / "alone.yaml", tasks=[{"task": name} for name in tasks])
        run_sweep(config, Options(output=alone, executor="inline"), toy.PARTS)
    if Report.read(output).rows() != Report.read(alone).rows():
        raise Broken("difference", str(Report.read(output).rows())[:2000])


class Sweeps:
    """Toy sweeps in a cluster whose head runs no cell, with two nodes that do."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.toy = toy_sweeps()
        # Ray has threads, of which a fork would be a broken half: drivers begin from a process that has kvbench alone
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["kvbench.cli", "kvbench.sweep.command"])
        self.folder = folder
        self.random = random.Random(seed)
        self.cluster = start_cluster(Path(self.toy.__file__).parent, cpus=0)
        self.nodes = [self.cluster.add_node(**NODE) for _ in range(2)]
        self.found = Found()

    def start(self, config: Path, output: Path) -> Any:
        """The command, in a process of its own."""
        flags = ["--output", str(output), "--executor", "ray", "--address", self.cluster.address]
        arguments = ["sweep", str(config), *flags]
        process = self.context.Process(target=self.toy.kvbench, args=(arguments, output.with_name("stderr")))
        process.start()
        return process

    def run(self, kinds: Sequence[str]) -> None:
        """One sweep with these kills, one after the other.

        Raises:
            Broken: a cell was lost, doubled or changed, or the table is another.
        """
        began = time.monotonic()
        self.found.sweeps += 1
        output, log = self.folder / f"run-{self.found.sweeps}", self.folder / f"log-{self.found.sweeps}"
        tasks = [{"task": f"toy_{i}", "seconds": SECONDS, "log": str(log)} for i in range(TASKS)]
        config = self.toy.write_config(self.folder / "killed.yaml", tasks=tasks)
        store, kept = Store(output), dict[str, str]()
        process = self.start(config, output)
        for kind in kinds:
            self.await_cells(store, len(kept) + self.random.randint(1, 4), process)
            time.sleep(self.random.uniform(0, SECONDS))
            if not process.is_alive():
                break
            self.kill(kind, process, Path(f"{log} of the processes"))
            self.found.kills[kind] += 1
            if kind == "driver":
                process.join()
                kept = check(store, kept)
                process = self.start(config, output)
            else:
                kept = check(store, kept)
        process.join(PATIENCE)
        errors = output.with_name("stderr").read_text()
        if process.exitcode != 0 or "Traceback" in errors:
            process.kill()
            raise Broken("sweep that does not end", f"exit {process.exitcode}\n{errors[-4000:]}")
        kept = check(store, kept)
        compare(output, self.folder, self.toy, [task["task"] for task in tasks])
        self.found.cells += len(kept)
        self.found.begun += len(log.read_text().splitlines())
        self.found.seconds += time.monotonic() - began

    def await_cells(self, store: Store, count: int, process: Any) -> None:
        """Returns when so many cells are kept, or the sweep has ended."""
        deadline = time.monotonic() + PATIENCE
        while process.is_alive() and time.monotonic() < deadline:
            if store.cells.is_dir() and len(list(store.cells.glob("toy-*"))) >= count:
                return
            time.sleep(0.02)

    def kill(self, kind: str, process: Any, pids: Path) -> None:
        """SIGKILL to the driver or to the worker that began a cell last, or a whole node; another takes its place."""
        if kind == "driver":
            process.kill()
        elif kind == "worker":
            pid = int(pids.read_text().split()[-1])
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                self.found.kills["worker that was gone already"] += 1
        else:
            node = self.nodes.pop(self.random.randrange(len(self.nodes)))
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self.cluster.add_node(**NODE))

    def end(self) -> None:
        """Stops the cluster."""
        self.cluster.shutdown()
