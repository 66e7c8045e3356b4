"""A Ray cluster of two nodes on this machine: a real sweep's records beside those of the other executors, and kills.

The same cells run inline, in two processes and in the cluster, one thread each, and every record and every sample is
compared to the bit. Then workers, nodes and drivers of toy sweeps are killed at random moments, by
tests/fuzz/kill_clusters.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kvbench.sweep.command
from kvbench.environment import describe
from kvbench.results import Record, Store

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("fuzz", "sweep")]
MEASURED = {"environment", "timings", "finished"}  # what a clock or a machine says


def plain(record: Record) -> dict[str, Any]:
    """A record without what was measured of the machine, also in its facts."""
    row = {key: value for key, value in record.to_json().items() if key not in MEASURED}
    for fact in ("agreement", "learned"):
        row["facts"].get(fact, {}).pop("seconds", None)
    return row


def equal_records(config: Path, limit: int | None, folder: Path) -> dict[str, Any]:
    """Cells, seconds by executor, and which records or samples are not those of `inline`."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 500 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    executors = {
        "inline": ["--executor", "inline"],
        "process": ["--devices", "cpu,cpu"],
        "ray": ["--executor", "ray", "--address", cluster.address],
    }
    seconds = {}
    for name, flags in executors.items():
        began = time.perf_counter()
        few = ["--limit", str(limit)] if limit else []
        program = [sys.executable, "-c", "from kvbench.cli import main; main()"]
        command = [*program, "sweep", str(config), "--output", str(folder / name), *flags, *few]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: exit {done.returncode}\n{done.stderr[-4000:]}")
        seconds[name] = round(time.perf_counter() - began, 1)
        print(f"{name}: {seconds[name]} s", flush=True)
    cluster.shutdown()
    return {**compared(folder), "limit": limit, "seconds": seconds}


def compared(folder: Path) -> dict[str, Any]:
    """How many cells each executor's run folder there has, and the names of those that are not as inline's."""
    alone = Store(folder / "inline")
    records = alone.load().records
    cells, differ = {"inline": len(records)}, []
    for name in ("process", "ray"):
        other = Store(folder / name)
        theirs = other.load().records
        cells[name] = len(theirs)
        for cell in records.keys() | theirs.keys():
            same = cell in records and cell in theirs and plain(records[cell]) == plain(theirs[cell])
            if not same or not alone.samples(cell).equals(other.samples(cell)):
                differ.append(f"{name}: {cell}")
    sources = sorted({str(record.environment.get("source_sha256")) for record in records.values()})
    return {"cells": cells, "differ": differ, "sources_sha256": sources}


def kills(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """What so many kills did; raises where a cell was lost, doubled or changed."""
    import kill_clusters

    sweeps = kill_clusters.Sweeps(folder, seed)
    try:
        while sum(sweeps.found.kills[kind] for kind in kill_clusters.KINDS) < count:
            sweeps.run([sweeps.random.choice(kill_clusters.KINDS) for _ in range(6)])
            print(sweeps.found, flush=True)
    finally:
        sweeps.end()
    found = sweeps.found
    return {
        "seed": seed,
        "kills": dict(found.kills),
        "sweeps": found.sweeps,
        "cells": found.cells,
        "begun": found.begun,
        "seconds": round(found.seconds, 1),
        "lost_doubled_or_changed": 0,
    }


def main() -> None:
    """Prints what was found, and writes it where it is told to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="write cluster-*.json there")
    parser.add_argument("--config", type=Path, help="of the sweep, such as configs/quickstart.yaml")
    parser.add_argument("--runs", type=Path, help="keep the run folders there, or compare those that are there")
    parser.add_argument("--limit", type=int, help="documents a task")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    kvbench.sweep.command.default_device = lambda: "cpu"
    # paths of this machine are left out
    told = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    found: dict[str, Any] = {"command": " ".join(["python", "benchmarks/cluster.py", *told])}
    with tempfile.TemporaryDirectory(prefix="kvbench-cluster-") as name:
        if options.kills:
            found["kills"] = kills(options.kills, options.seed, Path(name))
        if options.config:
            found["equal"] = equal_records(options.config, options.limit, options.runs or Path(name))
        elif options.runs:
            found["equal"] = compared(options.runs)
    print(json.dumps(found, indent=1))
    found["environment"] = describe()
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
        name = "-".join(["cluster", *(key for key in ("kills", "equal") if key in found)])
        Path(options.folder, f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
