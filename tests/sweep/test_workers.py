"""A process a device: cells are spread, a process that dies costs one cell, and nothing else changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kvbench.report.tables import Report
from kvbench.results import Store
from kvbench.sweep import command, execute
from kvbench.sweep.command import Options, run_sweep


@pytest.fixture
def sweep(tmp_path, toy):
    """Starts `kvbench sweep --devices cpu,cpu` over toys, in a process group of its own."""

    def started(devices="cpu,cpu", **changes):
        path = toy.write_config(tmp_path / "toys.yaml", **changes)
        program = [sys.executable, toy.__file__, "sweep", str(path), "--output", str(tmp_path / "run")]
        command = [*program, "--devices", devices]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)

    return started


def cells(tmp_path):
    return Store(tmp_path / "run").load().records


def test_two_processes_give_the_table_of_one(sweep, tmp_path, toy):
    """
    The same records, a shared baseline computed once, and a line a cell.
    """
    log, of_two = tmp_path / "log", tmp_path / "log of two"
    tasks = [{"task": "toy_a", "log": str(log), "seconds": 0.2}]
    process = sweep(tasks=tasks)
    _, errors = process.communicate(timeout=120)
    path = toy.write_config(tmp_path / "toys.yaml", tasks=tasks)
    (tmp_path / "log of the baseline").rename(of_two)
    assert run_sweep(path, Options(output=tmp_path / "alone"), toy.PARTS) == 0

    assert process.returncode == 0, errors
    assert json.loads(Report.read(tmp_path / "run").json()) == json.loads(Report.read(tmp_path / "alone").json())
    assert of_two.read_text().splitlines() == ["toy_a"]
    assert sum("/6  " in line for line in errors.splitlines()) == 6


def test_a_process_that_dies_costs_one_cell(sweep, tmp_path):
    """
    Its cell is kept as failed with the reason, the others are done, and the exit code says so.
    """
    process = sweep(tasks=[{"task": "toy_a", "dies": "int8"}, "toy_b"])
    _, errors = process.communicate(timeout=120)
    records = cells(tmp_path).values()
    failed = [(one.dtype, one.task, one.error) for one in records if one.status == "failed"]

    assert process.returncode == 3, errors
    assert failed == [("int8_per_token_head", "toy_a", "WorkerDiedError: its process ended: killed by SIGKILL")]
    assert len(records) == 12
    assert "1 of 12 cells failed" in errors


def children(process):
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout
    return [int(pid) for pid in listed.split()]


def alive(pid):
    """Neither gone nor a zombie."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_text())
    except OSError:
        return False


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_all_processes(sweep, tmp_path, kind):
    """
    Ctrl-C (to the whole group) and SIGTERM (to the parent): exit 130, no traceback, no process left.
    """
    process = sweep(tasks=[{"task": "toy_a", "seconds": 5.0}])
    deadline = time.monotonic() + 60
    while not children(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(4)
    workers = children(process)
    (os.killpg if kind == signal.SIGINT else os.kill)(process.pid, kind)
    _, errors = process.communicate(timeout=30)

    assert workers
    assert process.returncode == 130
    assert "Traceback" not in errors
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    assert all(record.status == "done" for record in cells(tmp_path).values())


def test_after_a_fault_of_the_gpu_the_rest_runs_in_another_process(tmp_path, toy, monkeypatch, capsys):
    """
    Where a cell raises and the GPU then fails every call, that cell is kept as failed and the others are handed over.
    """
    given = []
    monkeypatch.setattr(command, "default_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**20)
    monkeypatch.setattr(execute, "is_broken", lambda: True)
    monkeypatch.setattr(command, "execute_on", lambda seats, cells: given.extend(cell.label for cell in cells))
    path = toy.write_config(tmp_path / "toys.yaml", tasks=[{"task": "toy_a", "fails": "int8"}])
    assert run_sweep(path, Options(output=tmp_path / "run"), toy.PARTS) == 3

    assert [label.split()[0] for label in given] == ["int4_per_token_head", "int2_per_token_head"]
    statuses = {one.dtype: one.status for one in cells(tmp_path).values()}
    assert statuses == {"fp16": "done", "canary": "done", "again": "done", "int8_per_token_head": "failed"}
    assert "the GPU failed this process (no int8 today)" in capsys.readouterr().err


def test_a_gpu_that_is_not_here_is_said(tmp_path, toy):
    """
    Before anything runs, with how many there are.
    """
    path = toy.write_config(tmp_path / "toys.yaml")
    with pytest.raises(command.UnusableError, match=r"GPU 99: there are \d+ here"):
        run_sweep(path, Options(output=tmp_path / "run", devices=["cpu", "99"]), toy.PARTS)
