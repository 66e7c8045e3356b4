"""Cells on several devices at once: a process each, so that a fault costs one cell; this one hands them out."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import torch

from kvbench.environment import device_name, own_gpus, visible_gpu
from kvbench.runners.model_files import RefusedError
from kvbench.sweep.executors.base import gpus_here
from kvbench.sweep.executors.pool import Died, Queue, Seat, share_out
from kvbench.sweep.job import Advanced, Event, Job, Step, Tell
from kvbench.sweep.plan import Cell, too_large
from kvbench.sweep.session import Bench
from kvbench.sweep.spec import ModelSpec
from kvbench.sweep.stopping import UnusableError

START: Literal["spawn"] = "spawn"  # how a process begins: CUDA takes no fork of one that has used it
ADVANCE_SECONDS = 0.1  # between two messages about the same cell
END_SECONDS = 20.0  # that a process which hangs up has to end: one whose GPU failed may hang


# ---- in the worker


class Sparing:
    """Passes on what happens in a cell, and not each of its steps. send: takes what is passed on."""

    def __init__(self, send: Any, seconds: float) -> None:
        self.send = send
        self.seconds = seconds
        self.told = 0.0

    def __call__(self, step: Step) -> None:
        """Tells of a step."""
        if isinstance(step, Advanced):
            if time.monotonic() - self.told < self.seconds:
                return
            self.told = time.monotonic()
        self.send(step)


def work(connection: Connection, variables: dict[str, str]) -> None:
    """Runs the cells that come through the connection, until it closes. variables: of the environment, before CUDA."""
    os.environ.update(variables)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(event: Event | Exception) -> None:
        try:
            connection.send(event)
        except OSError:
            # where no one listens any more: not an exception, which would be recorded as the cell's
            os._exit(1)

    try:
        bench = Bench(connection.recv(), Sparing(send, ADVANCE_SECONDS))
        while True:
            cell: Cell = connection.recv()
            try:
                send(bench.run(cell))
            except (RefusedError, UnusableError, OSError) as error:
                send(error)  # the machine's fault, the disk's or the run folder's, not the cell's
                return
    except EOFError:
        return


def _end_with_parent() -> None:
    """Ends this process with its parent, in the middle of a cell too: an orphan would keep its GPU busy."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# ---- in the parent


class Processes:
    """A process a device. devices: "cpu", or GPUs by their numbers among those visible; "cuda": the first."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = devices

    @property
    def device(self) -> str:
        """See Executor."""
        return "cpu" if all(one == "cpu" for one in self.devices) else "cuda"

    @property
    def device_name(self) -> str:
        """See Executor."""
        return device_name(self.devices)

    def gpus(self, spec: ModelSpec) -> int:
        """See Executor."""
        return gpus_here(self.device, spec)

    def missing(self, cells: Sequence[Cell]) -> list[str]:
        """See Executor."""
        count = torch.cuda.device_count() if any(one != "cpu" for one in self.devices) else 0
        here = "no GPU" if count == 0 else "GPU 0 alone" if count == 1 else f"GPUs 0 to {count - 1}"
        return [
            f"GPU {one}: this machine has {here}; name others with --devices, or leave it out"
            for one in self.devices
            if one.isdigit() and int(one) >= count
        ] + [*spread_over_none(cells, self.devices), *too_large(cells, self.device)]

    def run(self, cells: Sequence[Cell], job: Job, tell: Tell) -> None:
        """See Executor."""
        seats = [seat_for(number, one, job) for number, one in enumerate(self.devices)]
        share_out(ProcessPool(seats), cells, job, tell, tries=1)


@dataclass
class ProcessSeat(Seat):
    """A device, and the process that uses it, where there is one yet."""

    job: Any = None
    variables: dict[str, str] | None = None
    process: BaseProcess | None = None
    connection: Any = None

    def start(self) -> None:
        """A new process here.

        Raises:
            UnusableError: this machine lets none begin.
        """
        context = multiprocessing.get_context(START)
        # Ctrl-C goes to the whole group; the parent alone heeds it, and a new process inherits what is ignored
        heeded = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.connection, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, self.variables), daemon=True)
            process.start()
        except OSError as error:
            raise UnusableError(
                f"no process can begin here: {error.strerror or error}; finished work is kept"
            ) from error
        finally:
            signal.signal(signal.SIGINT, heeded)
        self.process = process  # from here on it is ended with the others
        theirs.close()  # so that its end is the connection's

    def hear(self) -> Event | Died | Exception:
        """One message."""
        assert self.process is not None
        try:
            message: Event | Exception = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(END_SECONDS)
            code = self.process.exitcode
            how = "it hung up" if code is None else f"exit code {code}"
            if code is not None and code < 0:
                how = f"killed by {signal.Signals(-code).name}"
            return Died(f"its process ended: {how}")
        return message


class ProcessPool:
    """See Pool."""

    def __init__(self, seats: Sequence[ProcessSeat]) -> None:
        self._seats = seats

    def seats(self, queue: Queue) -> Sequence[Seat]:
        """See Pool."""
        return self._seats

    def give(self, seat: Seat, cell: Cell) -> None:
        """See Pool."""
        assert isinstance(seat, ProcessSeat)
        if seat.process is not None:
            try:
                seat.connection.send(cell)
                return
            except OSError:  # it died while it had nothing to do
                self.replace(seat)
        seat.start()
        with contextlib.suppress(OSError):  # it died already: `hear` will say so
            seat.connection.send(seat.job)
            seat.connection.send(cell)

    def wait(self) -> Iterable[tuple[Seat, Event | Died | Exception]]:
        """See Pool."""
        busy = {seat.connection: seat for seat in self._seats if seat.cell}
        for connection in wait(list(busy), timeout=1.0):
            seat = busy[connection]
            yield seat, seat.hear()

    def replace(self, seat: Seat) -> None:
        """See Pool. What it has not told is lost; the next cell starts the other."""
        assert isinstance(seat, ProcessSeat)
        if seat.process is not None:
            seat.process.kill()
            seat.process.join()
            seat.connection.close()
            seat.process = None

    def end(self) -> None:
        """See Pool."""
        for seat in self._seats:
            self.replace(seat)


def spread_over_none(cells: Sequence[Cell], devices: Sequence[str]) -> list[str]:
    """A line for each model that is to be spread, where each process sees one of the GPUs."""
    spread = dict.fromkeys(cell.model.name for cell in cells if cell.spec.device_map)
    return [
        f"model {name}: device_map: auto goes over all GPUs of one process, and with --devices each has one: leave "
        "that out (CUDA_VISIBLE_DEVICES says which GPUs there are), or take --executor ray and gpus: N"
        for name in (spread if [*devices] != ["cuda"] and any(one != "cpu" for one in devices) else ())
    ]


def seat_for(number: int, device: str, job: Job) -> ProcessSeat:
    """A seat on "cpu", on a GPU by its number among those that CUDA_VISIBLE_DEVICES shows, or on "cuda", the first."""
    if device == "cpu":
        environment = {**job.environment, "device": "cpu"}
        own_job = replace(job, device="cpu", environment=environment)
        return ProcessSeat(number, job=own_job, variables={"CUDA_VISIBLE_DEVICES": ""})
    name = visible_gpu(device)
    gpus = job.environment.get("gpus") or []
    own = gpus if device == "cuda" else own_gpus(gpus, name)  # a model may be spread over all that are visible
    environment = {**job.environment, "device": "cuda", "gpus": own}
    # numbered as nvidia-smi does, whose names the environment has
    variables = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": name, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return ProcessSeat(number, job=replace(job, device="cuda", environment=environment), variables=variables)
