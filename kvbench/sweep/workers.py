"""Cells on several devices at once: a process each, so that a fault costs one cell; one parent hands them out."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from kvbench.environment import own_gpus, visible_gpu
from kvbench.results import Record
from kvbench.runners.model_files import RefusedError
from kvbench.sweep.execute import (
    Bench,
    BrokenDeviceError,
    Setting,
    failed,
    raise_if_stopped,
    stop_unless_wrecked,
)
from kvbench.sweep.plan import Cell
from kvbench.sweep.progress import Watcher

ADVANCE_SECONDS = 0.1  # between two messages about the same cell
END_SECONDS = 20.0  # that a process which hangs up has to end: one whose GPU failed may hang


class WorkerDiedError(RuntimeError):
    """The process that ran a cell ended before the cell did."""


# ---- in the worker


@dataclass
class Sender:
    """A watcher that passes on what it sees. Where no one listens any more, the process ends."""

    connection: Connection
    told: float = 0.0

    def send(self, name: str, *values: Any) -> None:
        """A message to the parent."""
        try:
            self.connection.send((name, values))
        except OSError:
            # not an exception, which would be recorded as the cell's
            os._exit(1)

    def loading(self, model: str) -> None:
        """A model is being loaded."""
        self.send("loading", model)

    def started(self, cell: Cell) -> None:
        """A cell begins."""
        self.send("started")

    def advanced(self, done: int, total: int) -> None:
        """The running cell has done some of its requests."""
        if time.monotonic() - self.told > ADVANCE_SECONDS:
            self.told = time.monotonic()
            self.send("advanced", done, total)

    def finished(self, cell: Cell, record: Record) -> None:
        """A cell is done, or has failed; the record is in the run folder."""


def work(connection: Connection, variables: dict[str, str]) -> None:
    """Runs the cells that come through the connection, until it closes. variables: of the environment, before CUDA."""
    os.environ.update(variables)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        setting: Setting = _on_its_gpu(connection.recv())
        sender = Sender(connection)
        bench = Bench(setting, sender)
        while True:
            cell: Cell = connection.recv()
            try:
                bench.run(cell)
            except BrokenDeviceError:
                sender.send("broken")
                return
            except RefusedError as error:
                sender.send("refused", str(error))
                return
            except OSError as error:  # the disk's, or the run folder's: no fault of the cell's
                sender.send("unusable", error.errno, error.strerror or str(error), error.filename)
                return
            sender.send("finished")
    except EOFError:
        return


def _on_its_gpu(setting: Setting) -> Setting:
    """The setting with this process's GPU alone in its environment, as CUDA names it."""
    gpus = setting.environment.get("gpus") or []
    if setting.device == "cpu" or len(gpus) < 2:
        return setting
    with contextlib.suppress(RuntimeError):  # a GPU that can't be used is the first cell's error
        name = torch.cuda.get_device_name()
        own = [gpu for gpu in gpus if gpu["name"] == name][:1]
        return replace(setting, environment={**setting.environment, "gpus": own or gpus})
    return setting


def _end_with_parent() -> None:
    """Ends this process with its parent, in the middle of a cell too: an orphan would keep its GPU busy."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# ---- in the parent


@dataclass
class Seat:
    """A device, the process that uses it, and the cell that runs there."""

    setting: Setting
    variables: dict[str, str]
    watcher: Watcher
    cell: Cell | None = None
    model: Any = None
    began: float = 0.0
    since: str = ""  # the same, as records say it
    process: BaseProcess | None = None
    connection: Connection = field(init=False)

    def give(self, cell: Cell) -> None:
        """Runs a cell here, in a new process where there is none."""
        self.cell, self.model, self.began = cell, cell.model, time.monotonic()
        self.since = datetime.now(UTC).isoformat(timespec="seconds")
        if self.process is not None:
            with contextlib.suppress(OSError):  # it died while it had nothing to do
                self.connection.send(cell)
                return
        self._start()
        with contextlib.suppress(OSError):  # it died already: `hear` will say so
            self.connection.send(self.setting)
            self.connection.send(cell)

    def _start(self) -> None:
        """A new process here, in place of the old one."""
        self.end()
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.variables), daemon=True)
        # Ctrl-C goes to the whole group; the parent alone heeds it, and a new process inherits what is ignored
        heeded = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.process.start()
        signal.signal(signal.SIGINT, heeded)
        theirs.close()  # so that its end is the connection's

    def hear(self) -> Cell | None:
        """Takes one message; returns the cell if it has come to its end, its record in the run folder."""
        assert self.cell is not None
        try:
            name, values = self.connection.recv()
        except (EOFError, OSError):
            self._died(self.cell)
            name = "broken"
        if name == "loading":
            self.watcher.loading(*values)
        elif name == "started":
            self.watcher.started(self.cell)
        elif name == "advanced":
            self.watcher.advanced(*values)
        elif name == "refused":
            raise RefusedError(*values)
        elif name == "unusable":
            raise OSError(*values)
        else:
            if name == "broken":
                self.end()
            cell, self.cell = self.cell, None
            self.watcher.finished(cell, self.setting.store.read(cell.name))
            return cell
        return None

    def _died(self, cell: Cell) -> None:
        assert self.process is not None
        self.process.join(END_SECONDS)
        code = self.process.exitcode
        how = "it hung up" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            how = f"killed by {signal.Signals(-code).name}"
        store = self.setting.store
        kept = store.load().records.get(cell.name)
        if kept is None or kept.finished < self.since:  # it may have been kept just before
            seconds = time.monotonic() - self.began
            record = failed(cell, WorkerDiedError(f"its process ended: {how}"), self.setting.environment, seconds)
            store.save(record, [])

    def end(self) -> None:
        """Ends the process; what it has not kept is lost."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None
            self.connection.close()


def execute_on(seats: Sequence[Seat], cells: Sequence[Cell]) -> None:
    """Measures the cells on all seats at once and keeps each as it is done.

    A process that dies costs the cell that it ran, which is kept as failed; another takes its place.

    Raises: as `execute` does.
    """
    left = list(cells)
    try:
        while True:
            for seat in seats:
                if seat.cell is None and left:
                    seat.give(_next(left, seat, seats))
            busy = {seat.connection: seat for seat in seats if seat.cell}
            if not busy:
                return
            for connection in wait(list(busy)):
                ended = busy[connection].hear()  # type: ignore[index]  # wait also takes sockets
                running = [seat.cell for seat in seats if seat.cell]
                if ended and ended.judged and not any(c.judged and c.model == ended.model for c in left + running):
                    stop_unless_wrecked(seats[0].setting.store, ended)
            raise_if_stopped()
    finally:
        for seat in seats:
            seat.end()


def _next(left: list[Cell], seat: Seat, seats: Sequence[Seat]) -> Cell:
    """The next cell of the model that is loaded there, else of one that is loaded nowhere, else the first."""
    elsewhere = [other.model for other in seats if other is not seat]
    cell = next((one for one in left if one.model == seat.model), None)
    cell = cell or next((one for one in left if one.model not in elsewhere), left[0])
    left.remove(cell)
    return cell


def seat_for(device: str, setting: Setting, watcher: Watcher) -> Seat:
    """A seat on "cpu", on a GPU by its number among those that CUDA_VISIBLE_DEVICES shows, or on "cuda", the first."""
    if device == "cpu":
        environment = {**setting.environment, "device": "cpu"}
        return Seat(replace(setting, device="cpu", environment=environment), {"CUDA_VISIBLE_DEVICES": ""}, watcher)
    number = visible_gpu(device)
    own = own_gpus(setting.environment.get("gpus") or [], number)
    environment = {**setting.environment, "device": "cuda", "gpus": own}
    # numbered as nvidia-smi does, whose names the environment has
    variables = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": number, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return Seat(replace(setting, device="cuda", environment=environment), variables, watcher)
