"""What every executor must do alike: a sweep of toys as a command of its own, stopped, killed, failed and resumed."""

from __future__ import annotations

import errno
import os
import signal
import time

import pytest

from kvbench.report.tables import Report
from kvbench.results import Store
from kvbench.sweep.command import Options, run_sweep

EXECUTORS = {"inline": ["--executor", "inline"], "process": ["--devices", "cpu,cpu"]}


@pytest.fixture(params=[*EXECUTORS, "ray"])
def executor(request):
    """The flags of one of them."""
    if request.param == "ray":
        cluster = request.getfixturevalue("cluster")
        return ["--executor", "ray", "--address", cluster.address]
    return EXECUTORS[request.param]


@pytest.fixture
def sweep(tmp_path, toy, executor, start, quick_workers):
    """Starts `kvbench sweep` over toys by an executor."""
    # Ray has threads, of which a fork would be a broken half
    context = "clean" if "ray" in executor else "fork"

    def started(*flags, **changes):
        path = toy.write_config(tmp_path / "toys.yaml", **changes)
        return start("sweep", path, "--output", tmp_path / "run", *executor, *flags, context=context)

    return started


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "run")


def wait_for_cells(store, count, process, seconds=200):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.is_alive():
        if store.cells.is_dir() and len(list(store.cells.glob("toy-*"))) >= count:
            return
        time.sleep(0.01)


def told(record):
    """A record without what only a clock or the machine says."""
    row = record.to_json()
    return {key: value for key, value in row.items() if key not in ("environment", "timings", "finished")}


def test_records_are_those_of_one_process(sweep, ends, tmp_path, store, inline_run):
    """
    Equal to the bit but for times, with a line a cell; the baseline that two tasks share is computed once.
    """
    log = tmp_path / "log"
    tasks = [{"task": name, "log": str(log), "seconds": 0.1} for name in ("toy_a", "toy_b")]
    code, errors = ends(sweep(tasks=tasks))
    computed = (tmp_path / "log of the baseline").read_text().split()
    alone = inline_run(tasks=["toy_a", "toy_b"])

    assert code == 0, errors
    records = store.load().records
    assert {name: told(record) for name, record in records.items()} == {
        name: told(record) for name, record in alone.load().records.items()
    }
    for name in records:
        assert store.samples(name).equals(alone.samples(name))
    assert Report.read(store.folder).rows() == Report.read(alone.folder).rows()
    assert len(computed) == 1
    assert sum(" of 16  " in line for line in errors.splitlines()) == 16
    assert not list(store.folder.rglob(".draft-*"))


@pytest.fixture
def inline_run(tmp_path, toy):
    """A function: the sweep as this process runs it, which another executor is held against."""

    def ran(**changes):
        path = toy.write_config(tmp_path / "alone.yaml", **changes)
        assert run_sweep(path, Options(output=tmp_path / "alone", executor="inline"), toy.PARTS) == 0
        return Store(tmp_path / "alone")

    return ran


def test_a_failed_cell_costs_itself_and_is_run_again_when_asked(sweep, ends, store):
    """
    Exit 3 with the error in its record and one line; the same command leaves it, and --retry-failed runs it alone.
    """
    tasks = [{"task": "toy_a", "fails": "int8"}]
    code, errors = ends(sweep(tasks=tasks))
    (failed,) = [record for record in store.load().records.values() if record.status == "failed"]

    assert code == 3, errors
    assert failed.error == "RuntimeError: no int8 today"
    assert "toy.py" in failed.traceback
    assert sum("no int8 today" in line for line in errors.splitlines()) == 1
    before = {name: record.finished for name, record in store.load().records.items()}
    code, errors = ends(sweep("--retry-failed", tasks=["toy_a"]))
    assert code == 0, errors
    after = store.load().records
    assert {record.status for record in after.values()} == {"done"}
    assert {name: after[name].finished for name in before if name != failed.cell} == {
        name: finished for name, finished in before.items() if name != failed.cell
    }


def test_a_living_canary_stops_the_sweep(sweep, ends, store):
    """
    Where a zeroed cache changes nothing: exit 1, it is said why, and most quantized cells are never run.
    """
    tasks = [{"task": f"toy_{i}", "seconds": 0.02} for i in range(10)]
    code, errors = ends(sweep(model="blind", tasks=tasks))

    assert code == 1, errors
    assert "error: quantization not in effect" in errors
    records = store.load().records.values()
    assert {"fp16", "canary"} <= {record.dtype for record in records}
    # what ran beside the last of the canary's cells may be kept
    assert len(records) <= 2 * 10 + 3


def test_a_full_disk_is_no_cell_s_fault(sweep, ends, store):
    """
    What is met while a cell runs ends the sweep with exit code 4 and one line; no cell is kept as failed.
    """
    code, errors = ends(sweep(tasks=["toy_b", {"task": "toy_a", "fills": "int4"}]))

    assert code == 4, errors
    assert f": {os.strerror(errno.ENOSPC)}: /elsewhere/model; finished work is kept\n" in errors
    assert {record.status for record in store.load().records.values()} == {"done"}


@pytest.mark.parametrize(
    ("executor", "kind"),
    # which signal it was, the parent alone knows
    [*((name, kind) for name in EXECUTORS for kind in (signal.SIGINT, signal.SIGTERM)), ("ray", signal.SIGINT)],
    indirect=["executor"],
)
def test_a_stop_keeps_what_is_finished_and_the_same_command_goes_on(sweep, ends, store, kind):
    """
    Ctrl-C (to the whole group) and SIGTERM (to the parent): exit 130; what was done is not run again.
    """
    tasks = [{"task": "toy_a", "seconds": 0.2}]
    process = sweep(tasks=tasks)
    wait_for_cells(store, 2, process)
    (os.killpg if kind == signal.SIGINT else os.kill)(process.pid, kind)
    code, errors = ends(process)

    assert code == 130, errors
    assert errors.endswith("stopped; finished work is kept. The same command continues it.\n")
    kept = store.load()
    assert kept.problems == []
    assert 2 <= len(kept.records) < 8
    assert {record.status for record in kept.records.values()} == {"done"}
    code, errors = ends(sweep(tasks=tasks))
    assert code == 0, errors
    assert f"{len(kept.records)} done before" in errors
    after = store.load().records
    assert len(after) == 8
    assert all(after[name].finished == record.finished for name, record in kept.records.items())


@pytest.mark.parametrize("executor", EXECUTORS, indirect=True)
def test_a_killed_parent_loses_only_what_runs(sweep, ends, store):
    """
    SIGKILL: no half record, nothing of before is lost, and the same command finishes the rest. The driver of a cluster
    is killed in tests/fuzz/test_cluster_kills.py.
    """
    tasks = [{"task": "toy_a", "seconds": 0.2}]
    process = sweep(tasks=tasks)
    wait_for_cells(store, 2, process)
    process.kill()
    process.join(30)
    kept = store.load()

    assert kept.problems == []
    assert 2 <= len(kept.records) < 8
    code, errors = ends(sweep(tasks=tasks))
    assert code == 0, errors
    after = store.load().records
    assert len(after) == 8
    assert all(after[name].finished == record.finished for name, record in kept.records.items())
