"""What every executor must do alike: a sweep of toys as a command of its own, stopped, killed, failed and resumed."""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass

import pytest

from kvbench.report.tables import Report
from kvbench.results import Record, Store
from kvbench.sweep.command import Options, run_sweep

EXECUTORS = {"inline": ["--executor", "inline"], "process": ["--devices", "cpu,cpu"]}
# of the whole group, as Ctrl-C sends it, or of the parent; with a cluster the parent alone knows which it was
STOPS = {"inline": signal.SIGTERM, "process": signal.SIGINT, "ray": signal.SIGINT}


def flags_of(name, request):
    """The flags of an executor; the fixture `cluster` is asked for by Ray alone."""
    if name == "ray":
        return ["--executor", "ray", "--address", request.getfixturevalue("cluster").address]
    return EXECUTORS[name]


def context_of(flags):
    """Ray has threads, of which a fork would be a broken half."""
    return "clean" if "ray" in flags else "fork"


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


# ---- one sweep of each executor: stopped, gone on with while a cell fails, and that cell run again


@dataclass
class Command:
    """What one command of it ended with: exit code, stderr, and the run folder's records and problems."""

    code: int
    errors: str
    records: dict[str, Record]
    problems: list[str]

    def at(self, status):
        """When each record of a status was finished."""
        return {name: record.finished for name, record in self.records.items() if record.status == status}


@dataclass
class Life:
    """The three commands over a run folder. baselines: a line for each that was computed."""

    store: Store
    stopped: Command
    gone_on: Command
    retried: Command
    baselines: list[str]


@pytest.fixture(scope="module", params=STOPS)
def life(request, tmp_path_factory, toy, start_in, ends, quickly):
    """What these tests look at."""
    name = request.param
    flags, folder = flags_of(name, request), tmp_path_factory.mktemp(name)
    store, log = Store(folder / "run"), folder / "log"

    def command(*more, stop=None, fails=""):
        tasks = [{"task": one, "log": str(log), "seconds": 0.1} for one in ("toy_a", "toy_b")]
        tasks[1]["fails"] = fails
        path = toy.write_config(folder / "toys.yaml", tasks=tasks)
        arguments = ("sweep", path, "--output", store.folder, *flags, *more)
        process = start_in(folder, *arguments, context=context_of(flags))
        if stop:
            wait_for_cells(store, 2, process)
            (os.killpg if stop == signal.SIGINT else os.kill)(process.pid, stop)
        code, errors = ends(process)
        kept = store.load()
        return Command(code, errors, kept.records, kept.problems)

    with quickly():
        stopped, gone_on = command(stop=STOPS[name], fails="int2"), command(fails="int2")
        retried = command("--retry-failed")
    return Life(store, stopped, gone_on, retried, (folder / "log of the baseline").read_text().splitlines())


def test_a_stop_keeps_what_is_finished_and_the_same_command_goes_on(life):
    """
    Ctrl-C (to the whole group) or SIGTERM (to the parent): exit 130; what was done is not run again.
    """
    assert life.stopped.code == 130, life.stopped.errors
    assert life.stopped.errors.endswith("stopped; finished work is kept. The same command continues it.\n")
    assert life.stopped.problems == []
    assert 2 <= len(life.stopped.records) < 16
    done = life.stopped.at("done")
    assert f"{len(life.stopped.records)} done before" in life.gone_on.errors
    assert done.items() <= life.gone_on.at("done").items()
    assert len(life.gone_on.records) == 16


def test_a_failed_cell_costs_itself_and_is_run_again_when_asked(life):
    """
    Exit 3 with the error in its record and one line; --retry-failed runs it alone.
    """
    assert life.gone_on.code == 3, life.gone_on.errors
    (failed,) = life.gone_on.at("failed")
    record = life.gone_on.records[failed]
    assert record.error == "RuntimeError: no int2 today"
    assert "toy.py" in record.traceback
    assert sum("no int2 today" in line for line in life.gone_on.errors.splitlines()) == 1
    assert life.retried.code == 0, life.retried.errors
    after = life.retried.at("done")
    assert after.pop(failed)
    assert after == life.gone_on.at("done")


def test_records_are_those_of_one_process(life, tmp_path, toy):
    """
    Equal to the bit but for times, with a line a cell; the baseline that two tasks share is computed once.
    """
    path = toy.write_config(tmp_path / "alone.yaml")
    assert run_sweep(path, Options(output=tmp_path / "alone", executor="inline"), toy.PARTS) == 0
    alone = Store(tmp_path / "alone")

    records = life.store.load().records
    assert {name: told(record) for name, record in records.items()} == {
        name: told(record) for name, record in alone.load().records.items()
    }
    for name in records:
        assert life.store.samples(name).equals(alone.samples(name))
    assert Report.read(life.store.folder).rows() == Report.read(alone.folder).rows()
    assert len(life.baselines) == 1
    lines = sum(" of 16  " in line for line in life.gone_on.errors.splitlines())
    assert lines == 16 - len(life.stopped.records), life.gone_on.errors
    assert not list(life.store.folder.rglob(".draft-*"))


# ---- what ends a sweep for good


@pytest.fixture(params=STOPS)
def executor(request):
    """The flags of one of them."""
    return flags_of(request.param, request)


@pytest.fixture
def sweep(tmp_path, toy, executor, start, quick_workers):
    """Starts `kvbench sweep` over toys by an executor."""

    def started(*flags, **changes):
        path = toy.write_config(tmp_path / "toys.yaml", **changes)
        arguments = ("sweep", path, "--output", tmp_path / "run", *executor, *flags)
        return start(*arguments, context=context_of(executor))

    return started


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "run")


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


@pytest.mark.parametrize("executor", EXECUTORS, indirect=True)
def test_a_killed_parent_loses_only_what_runs(sweep, ends, store):
    """
    SIGKILL: no half record, nothing of before is lost, and the same command finishes the rest. The driver of a cluster
    is killed in test_ray.py.
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
