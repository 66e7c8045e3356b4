"""A sweep keeps what is finished, whatever happens to it."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
import weakref

import pytest

from kvbench.report.tables import Report
from kvbench.results import Store
from kvbench.sweep.command import Options, prepare, run_sweep
from kvbench.sweep.stopping import UnusableError
from kvbench.yaml_text import ConfigError


@pytest.fixture
def config(tmp_path, toy):
    def written(**changes):
        return toy.write_config(tmp_path / "toys.yaml", **changes)

    return written


@pytest.fixture
def run(tmp_path, toy):
    """Runs a sweep of toys into tmp_path/run; returns its exit code."""

    def ran(path, **options):
        return run_sweep(path, Options(output=tmp_path / "run", **options), toy.PARTS)

    return ran


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "run")


def logged(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("devices", [(), ("--devices", "cpu,cpu")], ids=["one process", "two"])
def test_a_limit_on_files_is_the_machine_s_fault(toy, config, run, store, tmp_path, devices):
    """
    Where samples may not be written whole, the sweep ends with exit code 4 and a line; without the limit it goes on.
    """
    path = config(tasks=["toy_b", {"task": "toy_a", "n": 20_000}])
    command = [sys.executable, toy.__file__, "sweep", str(path), "--output", str(store.folder), *devices]

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (32_768, 32_768))

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, preexec_fn=limited)

    assert done.returncode == 4, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: cannot write to {store.folder}: ")
    assert last.endswith("finished work is kept")
    assert "Traceback" not in done.stderr
    kept = store.load()
    assert not kept.problems
    assert {record.task for record in kept.records.values()} <= {"toy_b"}
    assert {record.status for record in kept.records.values()} <= {"done"}
    assert run(path) == 0
    assert not list(store.folder.rglob(".draft-*"))


def test_a_full_disk_is_no_cell_s_fault(config, run, store):
    """
    Whatever a library made of the error, no cell is kept as failed.
    """
    with pytest.raises(UnusableError, match=rf": {os.strerror(errno.ENOSPC)}: /elsewhere/model; finished work is kept"):
        run(config(tasks=["toy_b", {"task": "toy_a", "fills": "int4"}]))

    assert {record.status for record in store.load().records.values()} == {"done"}


def test_what_is_done_is_not_run_again(config, run, store, tmp_path):
    """
    The same command a second time runs nothing; a task added to the file runs alone.
    """
    log = tmp_path / "log"
    assert run(config(tasks=[{"task": "toy_a", "log": str(log)}])) == 0
    first = logged(log)

    assert run(config(tasks=[{"task": "toy_a", "log": str(log)}])) == 0
    assert logged(log) == first

    assert run(config(tasks=[{"task": name, "log": str(log)} for name in ("toy_a", "toy_b")])) == 0
    assert logged(log)[len(first) :] == [line.replace("toy_a", "toy_b") for line in first]


def test_a_failed_cell_keeps_its_error_and_the_sweep_goes_on(config, run, store, capsys):
    """
    A cell that raises is recorded with its traceback and named in one line; the others are measured; exit 3.
    """
    assert run(config(tasks=[{"task": "toy_a", "fails": "int8"}, "toy_b"])) == 3

    records = store.load().records.values()
    (failed,) = [record for record in records if record.status == "failed"]
    assert (failed.dtype, failed.task, failed.error) == (
        "int8_per_token_head",
        "toy_a",
        "RuntimeError: no int8 today",
    )
    assert "Traceback" in failed.traceback
    assert "toy.py" in failed.traceback
    assert sum(record.status == "done" for record in records) == 15
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if "no int8 today" in line]
    assert str(store.cells / failed.cell / "record.json") in line


def test_failed_cells_are_run_again_when_asked(config, run, store, tmp_path):
    """
    A failed cell stays failed, and the exit code 3, until --retry-failed.
    """
    tasks = [{"task": "toy_a", "fails": "int8", "log": str(tmp_path / "log")}]
    assert run(config(tasks=tasks)) == 3
    before = logged(tmp_path / "log")

    assert run(config(tasks=[{**tasks[0], "fails": ""}])) == 3
    assert logged(tmp_path / "log") == before
    assert run(config(tasks=[{**tasks[0], "fails": ""}]), retry_failed=True) == 0

    assert logged(tmp_path / "log")[len(before) :] == ["toy_a int8_per_token_head"]
    assert len(store.done()) == 8


def test_fresh_starts_over(config, run, store, tmp_path):
    """
    --fresh forgets the results of the cells it is about, and runs them.
    """
    log = tmp_path / "log"
    path = config(tasks=[{"task": "toy_a", "log": str(log)}])
    run(path)
    before = logged(log)

    run(path, fresh=True, only=["dtype=int8"])
    assert logged(log)[len(before) :] == ["toy_a int8_per_token_head"]
    run(path, fresh=True)
    assert len(logged(log)) == 2 * len(before) + 1
    assert len(store.done()) == 8


def test_the_margin_stays_as_it_was_fixed(config, run, store):
    """
    Another margin is refused while a result is there, and run.json keeps the first; --fresh takes it.
    """
    path = config(tasks=["toy_a"])
    assert run(path) == 0

    for options in ({}, {"fresh": True, "only": ["dtype=int8"]}):
        with pytest.raises(ConfigError, match=r"measured under margin 1pp, fixed before its first cell; .*--fresh"):
            run(path, settings=["margin=90pp"], **options)
    assert store.run()["config"]["margin"] == "1pp"
    assert len(store.done()) == 8
    assert run(path, settings=["margin=1.0pp"]) == 0
    assert run(path, settings=["margin=90pp"], fresh=True) == 0
    assert store.run()["config"]["margin"] == "90pp"


def test_a_broken_record_is_said_and_run_again(config, run, store, capsys):
    """
    A half-written record costs one line and one cell.
    """
    path = config(tasks=["toy_a"])
    run(path)
    broken = sorted(store.done())[0]
    (store.cells / broken / "record.json").write_text('{"version": 1, "ce')
    capsys.readouterr()

    assert run(path) == 0

    assert len(store.done()) == 8
    lines = capsys.readouterr().err.splitlines()
    assert sum("not a whole record" in line for line in lines) == 1
    assert sum("8 of 8  " in line for line in lines) == 1


def test_the_baseline_is_computed_once_for_all_cells(config, run, store):
    """
    Tensors of the baseline are shared by the cells of a model; another model has its own.
    """
    assert run(config(model=None, models=["toy", "other"], tasks=["toy_a", "toy_b"])) == 0

    assert sorted(path.name.rsplit("-", 1)[0] for path in store.baselines.glob("*.safetensors")) == [
        "other-quality",
        "toy-quality",
    ]


def test_a_model_is_loaded_once(config, tmp_path, toy):
    """
    The cells of a model run on one loaded model, and none is loaded where nothing is left to do.
    """
    opened = []

    def open_model(*arguments):
        opened.append(arguments[0].name)
        return toy.open_model(*arguments)

    parts = toy.Parts(toy.find_model, toy.fetch_model, open_model, toy.make_task)
    path = config(model=None, models=["toy", "other"])

    assert run_sweep(path, Options(output=tmp_path / "run"), parts) == 0
    assert run_sweep(path, Options(output=tmp_path / "run"), parts) == 0
    assert opened == ["toy", "other"]


def test_a_model_is_gone_before_the_next_is_loaded(config, tmp_path, toy, monkeypatch):
    """
    Its memory is free by then, though it lies in a cycle and collections spare what outlives a cell.
    """
    for module in ("session", "executors.inline"):
        monkeypatch.setattr(f"kvbench.sweep.{module}.gc", gc)  # which other tests do without
    held = []

    def open_model(*arguments):
        assert [one() for one in held] == [None] * len(held)
        model = toy.open_model(*arguments)
        model.itself = model
        held.append(weakref.ref(model))
        return model

    parts = toy.Parts(toy.find_model, toy.fetch_model, open_model, toy.make_task)
    path = config(model=None, models=["toy", "other"])

    assert run_sweep(path, Options(output=tmp_path / "run"), parts) == 0
    assert len(held) == 2


def test_a_model_that_cannot_be_loaded_fails_its_cells_alone(config, tmp_path, toy):
    """
    Another model's cells are measured all the same.
    """

    def open_model(spec, *rest):
        if spec.name == "other":
            raise MemoryError("no room")
        return toy.open_model(spec, *rest)

    parts = toy.Parts(toy.find_model, toy.fetch_model, open_model, toy.make_task)

    assert run_sweep(config(model=None, models=["other", "toy"]), Options(output=tmp_path / "run"), parts) == 3
    records = Store(tmp_path / "run").load().records.values()
    assert {(record.model["name"], record.status) for record in records} == {("other", "failed"), ("toy", "done")}


def test_a_living_canary_stops_the_sweep(config, run, store, monkeypatch, capsys):
    """
    Where a zeroed cache changes nothing, no quantized cell is run: exit 1, and it is said why.
    """
    monkeypatch.setenv("TOY_IGNORES_CACHE", "1")
    path = config()

    assert run(path) == 1
    assert {record.dtype for record in store.load().records.values()} == {"fp16", "canary"}
    assert "error: quantization not in effect" in capsys.readouterr().err
    # and it is not forgotten by the next run, which measures no further cell until it starts over
    monkeypatch.delenv("TOY_IGNORES_CACHE")
    before = store.done()
    assert run(path) == 1
    assert store.done() == before
    assert "error: quantization not in effect" in capsys.readouterr().err
    assert run(path, fresh=True) == 0


def test_a_canary_without_its_baseline_is_judged_once_there_is_one(config, run, store, monkeypatch):
    """
    Where the canary is measured first, the baseline's cells are what stops the sweep.
    """
    monkeypatch.setenv("TOY_IGNORES_CACHE", "1")
    path = config()

    assert run(path, only=["dtype=canary"]) == 0
    assert run(path) == 1
    assert {record.dtype for record in store.load().records.values()} == {"fp16", "canary"}


def test_only_what_can_run_here_is_begun(config, run, store):
    """
    What is missing is said before anything runs, unless the cells that want it are done or left out.
    """
    lacking = config(tasks=["toy_a", {"task": "toy_b", "lacks": "toy_b wants a file: put it there"}])

    with pytest.raises(UnusableError, match="toy_b wants a file: put it there"):
        run(lacking)
    assert not store.done()
    assert run(lacking, skip=["task=toy_b"]) == 0
    with pytest.raises(UnusableError, match="model absent: fetch it from somewhere"):
        run(config(model="absent"))


def test_a_missing_model_is_fetched(config, tmp_path, toy):
    """
    A model that isn't here is brought before its cells are named: its revision is part of them.
    """
    here = []

    def find_model(spec):
        facts = toy.find_model(spec)
        return facts if here else toy.ModelFacts(facts.name, facts.compute_dtype, missing="fetch it")

    parts = toy.Parts(find_model, lambda spec: here.append(spec.name), toy.open_model, toy.make_task)

    assert run_sweep(config(), Options(output=tmp_path / "run"), parts) == 0
    assert here == ["toy"]
    records = Store(tmp_path / "run").load().records.values()
    assert {record.identity["model"]["revision"] for record in records} == {"r1"}


def test_two_sweeps_of_one_folder_are_refused(config, run, store):
    """
    The second of two at the same time says so and touches nothing.
    """
    with store.writing(), pytest.raises(UnusableError, match="another sweep is writing"):
        run(config())


def test_a_folder_that_keeps_no_second_writer_out_is_refused(config, run, store, monkeypatch):
    """
    A mount without locks, before anything is written to it; the lock file of a process that is gone locks nothing.
    """

    def no_locks(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", no_locks)
        with pytest.raises(UnusableError, match=r"cannot write to .*/run: No locks available"):
            run(config())
    assert [path.name for path in store.folder.iterdir()] == [".lock"]
    assert run(config()) == 0


def test_a_record_says_what_it_is_of(config, run, store):
    """
    A record carries true sizes, the scoring mode, times, and the machine.
    """
    run(config(dtypes=["int4"], tasks=["toy_a"], note="hello"))

    (record,) = [one for one in store.load().records.values() if one.dtype == "int4_per_token_head"]
    assert (record.bits_per_value, record.kv_bytes_per_token, record.scoring) == (4.5, 432, "fused")
    assert record.model["layers"] == [[2, 64]] * 3
    assert record.timings["seconds"] >= 0
    assert record.environment["versions"]["torch"]
    assert record.facts == {"documents_sha256": "abc", "attention": None}
    assert store.samples(record.cell)["doc_hash"].tolist() == [f"d{i}" for i in range(50)]
    assert store.run()["note"] == "hello"


def test_what_a_cell_took_is_measured_and_shown(config, run, store):
    """
    What the runner measured is in each record, and below the scores a row a scheme sums it; the rest is a dash.
    """
    run(config())
    record = next(one for one in store.load().records.values() if one.dtype == "int8_per_token_head")
    _, cost = Report.read(store.folder).tables()
    row = next(row for row in cost.rows if row[0] == "int8_per_token_head")

    assert record.timings["kv_bytes_per_token"] == record.kv_bytes_per_token
    assert row[2:7] == ["-", f"{record.kv_bytes_per_token}", f"{record.kv_bytes_per_token}", "200", "-"]
    assert not cost.warnings


def test_a_cache_of_another_size_than_its_dtype_s_is_said(config, run, store, toy, monkeypatch):
    """
    The record has both numbers, and the report warns of them.
    """
    monkeypatch.setattr(toy.ToyRunner, "stats", lambda self: {"kv_bytes_per_token": 1000.5})
    run(config())
    _, cost = Report.read(store.folder).tables()

    records = [one for one in store.load().records.values() if not one.canary]
    assert all(one.facts["kv_bytes"].startswith("1000.5 bytes a token measured, ") for one in records)
    assert len(cost.warnings) == len(records)


def test_no_terminal_gets_a_line_a_cell(config, run, capsys):
    """
    Where stderr is no terminal nothing is redrawn: a header, a line for each finished cell, a last line.
    """
    run(config(tasks=["toy_a"]))

    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert "\x1b" not in captured.err
    assert lines[0].startswith("toys · 8 cells · ")
    assert [line.split()[:3] for line in lines[1:-1]] == [[str(i + 1), "of", "8"] for i in range(8)]
    assert lines[-1].startswith("8 of 8 cells done · kvbench report ")


# ---- stopped and killed


def start(path, output, toy):
    """The sweep in a process of its own; torch is there already, so it starts at once."""

    def ran():
        os.setpgrp()
        os._exit(run_sweep(path, Options(output=output), toy.PARTS))

    process = multiprocessing.get_context("fork").Process(target=ran)
    process.start()
    return process


def wait_for_cells(output, count, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.is_alive():
        if (output / "cells").is_dir() and len(list((output / "cells").glob("toy-*"))) >= count:
            return
        time.sleep(0.002)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_says_that_it_can_go_on(config, tmp_path, toy, kind, capfd):
    """
    Ctrl-C and SIGTERM keep what is finished and exit with 130; the same command finishes the rest.
    """
    path = config(tasks=[{"task": "toy_a", "seconds": 0.2}])
    output = tmp_path / "run"
    process = start(path, output, toy)
    wait_for_cells(output, 2, process)
    os.kill(process.pid, kind)
    process.join(30)

    assert process.exitcode == 130
    errors = capfd.readouterr().err
    assert "stopped; finished work is kept. The same command continues it." in errors
    assert "Traceback" not in errors
    assert 2 <= len(Store(output).done()) < 5
    assert Store(output).load().problems == []
    assert run_sweep(path, Options(output=output), toy.PARTS) == 0
    assert len(Store(output).done()) == 8


def test_a_stop_that_a_library_swallows_is_no_failure(config, tmp_path, toy):
    """
    Where compiled code makes another error of the interrupt, the sweep stops all the same; the cell is not done.
    """
    path = config(tasks=[{"task": "toy_a", "swallows": "int8"}])
    output = tmp_path / "run"

    assert run_sweep(path, Options(output=output), toy.PARTS) == 130
    records = Store(output).load().records.values()
    assert {record.status for record in records} == {"done"}
    assert "int8_per_token_head" not in {record.dtype for record in records}


def test_a_killed_sweep_loses_at_most_the_cell_in_flight(config, tmp_path, toy):
    """
    Killed with SIGKILL at random moments and continued, a sweep ends with the tables of one that was left alone.
    """
    path = config(tasks=[{"task": f"toy_{i}", "seconds": 0.005} for i in range(6)])
    assert run_sweep(path, Options(output=tmp_path / "alone"), toy.PARTS) == 0
    rng = random.Random(0)
    output = tmp_path / "killed"
    finished: set[str] = set()
    for _ in range(8):
        process = start(path, output, toy)
        wait_for_cells(output, len(finished) + 1, process)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        now = Store(output).load()
        assert now.problems == []
        assert finished <= set(now.records), "a finished cell was lost"
        finished = set(now.records)

    assert len(finished) < len(prepare(path, Options(), toy.PARTS).cells), "it was never killed in time"
    assert run_sweep(path, Options(output=output), toy.PARTS) == 0

    def table(folder):
        return Report.read(folder).rows()

    assert table(output) == table(tmp_path / "alone")
    assert not list(output.rglob(".draft-*"))


def test_a_scheme_of_any_kind_is_kept_and_read_again(config, run, store):
    """
    A window, layers of their own, another calibration, a lesson without means: measured, recorded, and found done
    the next time.
    """
    schemes = [
        "int4+w64s4",
        {"dtype": "int4", "layers": {"0": "int8"}},
        {"scheme": "int4_centered", "calibration": {"tokens": 9}},
        {"dtype": "int4", "rotation": "reorder"},
    ]
    path = config(dtypes=["int8"], schemes=schemes)

    assert run(path) == 0
    records = store.load()
    assert records.problems == []
    assert {"int4_per_token_head+w64s4", "int4_per_token_head+l0=int8_per_token_head", "int4_per_token_head+c9"} < {
        record.dtype for record in records.records.values()
    }
    taught = {r.rotation: r.facts["learned"] for r in records.records.values() if "learned" in r.facts}
    assert len(taught) == 2
    assert "means" not in taught.pop("reorder")
    assert [one["tokens"] for one in taught.values()] == [9]
