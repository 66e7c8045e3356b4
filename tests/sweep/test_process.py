"""A process a device: cells are spread, a process that dies costs one cell, and nothing else changes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvbench.results import Store
from kvbench.sweep import command
from kvbench.sweep.command import Options, make_executor, run_sweep
from kvbench.sweep.executors.inline import Inline
from kvbench.sweep.executors.process import Processes, ProcessPool, ProcessSeat, seat_for
from kvbench.sweep.job import Job
from kvbench.sweep.session import on_its_gpus
from kvbench.sweep.spec import ModelSpec
from kvbench.sweep.stopping import UnusableError
from kvbench.yaml_text import ConfigError


@pytest.fixture
def sweep(tmp_path, toy, start):
    """Starts `kvbench sweep --devices cpu,cpu` over toys."""

    def started(devices="cpu,cpu", **changes):
        path = toy.write_config(tmp_path / "toys.yaml", **changes)
        return start("sweep", path, "--output", tmp_path / "run", "--devices", devices)

    return started


def cells(tmp_path):
    return Store(tmp_path / "run").load().records


def test_a_process_that_dies_costs_one_cell(sweep, ends, tmp_path):
    """
    Its cell is kept as failed with the reason, the others are done, and the exit code says so.
    """
    process = sweep(tasks=[{"task": "toy_a", "dies": "int8"}, "toy_b"])
    code, errors = ends(process)
    records = cells(tmp_path).values()
    failed = [(one.dtype, one.task, one.error) for one in records if one.status == "failed"]

    assert code == 3, errors
    assert failed == [("int8_per_token_head", "toy_a", "WorkerDiedError: its process ended: killed by SIGKILL")]
    assert len(records) == 16
    assert "1 of 16 cells failed" in errors


def test_a_process_that_can_not_begin_ends_all(toy, tmp_path, monkeypatch):
    """
    It is told as the machine's fault with exit code 4, Ctrl-C is heeded again, and the processes that did begin end.
    """
    begun = []
    context = multiprocessing.get_context("spawn")

    def first_alone(process):
        if begun:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        begun.append(process)
        process._popen = SimpleNamespace(kill=lambda: ended.append(process), wait=lambda timeout: 0, returncode=0)

    ended, heeded = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(context.Process, "start", first_alone)
    pool = ProcessPool([ProcessSeat(number) for number in range(2)])
    pool._seats[0].start()
    with pytest.raises(UnusableError, match="no process can begin here: Resource temporarily unavailable; finished"):
        pool._seats[1].start()
    pool.end()

    assert signal.getsignal(signal.SIGINT) is heeded
    assert ended == begun


def alive(pid):
    """Neither gone nor a zombie."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_text())
    except OSError:
        return False


def begun(tmp_path, seconds=60):
    """The processes that have begun a cell, when two have."""
    log, deadline = tmp_path / "log of the processes", time.monotonic() + seconds
    while time.monotonic() < deadline:
        if log.exists() and len(pids := set(log.read_text().split())) == 2:
            return [int(pid) for pid in pids]
        time.sleep(0.02)
    raise AssertionError("no two processes began a cell")


def ended(pids, seconds=10):
    """Whether all of them end in so many seconds."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_all_processes(sweep, ends, tmp_path, quick_workers, kind):
    """
    Ctrl-C (to the whole group) and SIGTERM (to the parent): exit 130, no traceback, no process left.
    """
    process = sweep(tasks=[{"task": "toy_a", "seconds": 5.0, "log": str(tmp_path / "log")}])
    workers = begun(tmp_path)
    (os.killpg if kind == signal.SIGINT else os.kill)(process.pid, kind)
    code, _ = ends(process, 30)

    assert code == 130
    assert ended(workers)
    assert all(record.status == "done" for record in cells(tmp_path).values())


def test_a_fault_of_the_gpu_costs_one_cell(sweep, ends, tmp_path):
    """
    Where a cell raises and the GPU then fails every call, it is kept with its own error, and the rest runs in another
    process; --retry-failed runs it alone.
    """
    log = tmp_path / "log"
    process = sweep(devices="cpu", tasks=[{"task": "toy_a", "breaks": "int8", "log": str(log)}])
    code, errors = ends(process)
    statuses = {one.dtype: (one.status, one.error) for one in cells(tmp_path).values()}
    first, second = dict.fromkeys((tmp_path / "log of the processes").read_text().split())

    assert code == 3, errors
    assert statuses.pop("int8_per_token_head") == ("failed", "RuntimeError: device-side assert triggered")
    assert set(statuses.values()) == {("done", None)}
    assert len(statuses) == 7
    assert (tmp_path / "log of the processes").read_text().split() == [first] * 4 + [second] * 4


def test_on_a_gpu_cells_never_run_in_the_parent(monkeypatch):
    """
    Without --devices they run in a process on the first GPU that is visible, whose memory a fault can't keep, unless
    this process is asked for.
    """
    monkeypatch.setattr(command, "default_device", lambda: "cuda")
    executor = make_executor(Options())
    seat = seat_for(0, *executor.devices, Job(None, None, 16, "auto", "cuda", {}))

    assert executor.device == seat.job.device == seat.job.environment["device"] == "cuda"
    assert seat.variables == {}
    assert isinstance(make_executor(Options(executor="inline")), Inline)


@pytest.mark.parametrize(
    ("shown", "device", "seen", "own"),
    [
        (None, "1", {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, ["B"]),
        ("1,0", "0", {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, ["B"]),
        ("GPU-5e2f, 0", "0", {"CUDA_VISIBLE_DEVICES": "GPU-5e2f", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, ["A", "B"]),
        # which of them a cell runs on, its model decides
        ("1", "cuda", {}, ["A", "B"]),
        ("1,0", "cuda", {}, ["A", "B"]),
        (None, "cuda", {}, ["A", "B"]),
    ],
)
def test_a_process_sees_the_gpu_that_was_meant(monkeypatch, shown, device, seen, own):
    """
    Numbers count what CUDA_VISIBLE_DEVICES shows, UUIDs included; where no number says which GPU, CUDA will name it. A
    model that is spread has them all.
    """
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    gpus = [{"name": "A"}, {"name": "B"}]
    seat = seat_for(0, device, Job(None, None, 16, "auto", "cpu", {"gpus": gpus}))

    assert seat.variables == seen
    assert [gpu["name"] for gpu in seat.job.environment["gpus"]] == own
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "B")
    assert on_its_gpus(seat.job, ModelSpec(name="one")).environment["gpus"] == [{"name": "B"}]
    spread = on_its_gpus(seat.job, ModelSpec(name="large", device_map="auto")).environment["gpus"]
    all_seen = ["AB"[int(one)] for one in (shown or "0,1").split(",")] if device == "cuda" else own
    assert [gpu["name"] for gpu in spread] == all_seen


def test_a_model_that_is_spread_needs_a_process_of_its_own(monkeypatch, toy):
    """
    With --devices each process sees one GPU, so what would then not fit is said before anything is loaded.
    """
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    spec = ModelSpec(name="toy", device_map="auto")
    cell = SimpleNamespace(spec=spec, model=toy.find_model(spec))

    assert Processes(["cuda"]).missing([cell]) == []
    assert Processes(["cuda"]).gpus(spec) == 4
    (line,) = Processes(["0", "1"]).missing([cell])
    assert line.startswith("model toy: device_map: auto goes over all GPUs of one process, and with --devices each has")


def test_a_process_that_died_between_two_cells_costs_none(monkeypatch):
    """
    The next cell goes to a new process.
    """
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    died = SimpleNamespace(kill=lambda: None, join=lambda: None)
    seat = ProcessSeat(0, job="job", process=died, connection=ours)
    new, other = multiprocessing.Pipe()
    monkeypatch.setattr(ProcessSeat, "start", lambda seat: setattr(seat, "connection", new))
    ProcessPool([seat]).give(seat, "cell")

    assert [other.recv(), other.recv()] == ["job", "cell"]


def test_a_killed_parent_leaves_no_process(sweep, tmp_path, quick_workers):
    """
    SIGKILL to the parent alone, in the middle of long cells.
    """
    process = sweep(tasks=[{"task": "toy_a", "seconds": 60.0, "log": str(tmp_path / "log")}])
    workers = begun(tmp_path)
    process.kill()
    process.join(30)

    assert ended(workers)


def test_a_fault_of_the_gpu_ends_a_sweep_in_this_process(toy, tmp_path, monkeypatch):
    """
    The cell that met it, while it loaded its model too, is kept as failed; exit code 4 says what goes on.
    """

    def fails(*_):
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr("kvbench.sweep.session.is_broken", lambda: True)
    parts = toy.Parts(toy.find_model, toy.fetch_model, fails, toy.make_task)
    path = toy.write_config(tmp_path / "toys.yaml")
    with pytest.raises(UnusableError, match="fails every call since RuntimeError: device-side assert"):
        run_sweep(path, Options(output=tmp_path / "run", executor="inline"), parts)

    assert [one.status for one in cells(tmp_path).values()] == ["failed"]


def test_flags_that_do_not_go_together_are_refused():
    """
    One line, exit code 2.
    """
    with pytest.raises(ConfigError, match="--executor inline takes no --devices"):
        make_executor(Options(executor="inline", devices=["cpu"]))


def test_a_gpu_that_is_not_here_is_said(tmp_path, toy):
    """
    Before anything runs, with those that are, and without the advice to skip a task.
    """
    path = toy.write_config(tmp_path / "toys.yaml")
    with pytest.raises(UnusableError, match=r"GPU 99: this machine has .*GPU.*; name others") as raised:
        run_sweep(path, Options(output=tmp_path / "run", devices=["cpu", "99"]), toy.PARTS)
    assert "--skip" not in str(raised.value)
