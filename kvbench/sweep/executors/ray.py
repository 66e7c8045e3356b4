"""Cells in a Ray cluster: a worker a GPU, or several to one, on every node that has what the cells need."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvbench.environment import VARIABLES, Check, describe
from kvbench.results import Store
from kvbench.sweep.executors import ray_worker
from kvbench.sweep.executors.pool import Died, Queue, Seat, share_out
from kvbench.sweep.job import Event, Finished, Job, Tell
from kvbench.sweep.parts import ModelFacts, Parts
from kvbench.sweep.plan import Cell
from kvbench.sweep.spec import ModelSpec
from kvbench.sweep.stopping import UnusableError

TRIES = 3  # of a cell, each on another node where there is one
START_FAILURES = 3  # of workers in a row, before the cluster is called unusable
LOOK_SECONDS = 120.0  # that a node has to answer
GROW_SECONDS = 1.0  # between two looks for room
LONGEST_CAUSE = 300  # characters
WAIT_SECONDS = 30.0  # without any worker, before a line says so
# must be the same everywhere: they decide numbers, or how cells are sent
SAME = ("torch", "transformers", "triton", "tokenizers", "lm_eval", "numpy")

logger = logging.getLogger(__name__)


def load_ray() -> Any:
    """The module.

    Raises:
        UnusableError: it is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UnusableError(f"--executor ray needs Ray ({error}): pip install 'kvbench[ray]'") from None


@dataclass
class Node:
    """A machine of the cluster. environment, lacks: None until it has been looked at."""

    id: str
    name: str
    gpus: float
    cpus: float
    looking: Any = None
    environment: dict[str, Any] | None = None
    lacks: list[str] | None = None


class Cluster:
    """A connection to a Ray cluster.

    address: "auto" for one that runs on this machine, HOST:PORT of its head; None as Ray itself does: RAY_ADDRESS, else
    one that runs on this machine, else one of this machine alone, which ends with this process.

    Raises:
        UnusableError: no Ray, no cluster there, or one of other versions.
    """

    def __init__(self, address: str | None) -> None:
        self.ray = load_ray()
        self.known: dict[str, Node] = {}
        self.here = describe()
        self.needs: ray_worker.Needs | None = None
        try:
            found = find_cluster(address)
            self.ray.init(
                address=found,
                include_dashboard=False if found == "local" else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                ignore_reinit_error=True,
            )
        except UnusableError:
            raise
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, self.ray.exceptions.RayError) as error:
            text = " ".join(str(error).split())
            what = "versions that differ" if "ersion mismatch" in text else "no Ray cluster"
            token = (
                "; where it asks for a token, set RAY_AUTH_MODE=token" if text.startswith("Failed to connect") else ""
            )
            raise UnusableError(f"{what} at {address or 'RAY_ADDRESS or this machine'}: {text[:300]}{token}") from None
        # what Ray tells of nodes would stand on stdout, in the middle of a result
        self.ray._private.worker._worker_logs_enabled = False

    def nodes(self) -> list[Node]:
        """Those that are alive now and have GPUs, or CPUs where none has a GPU."""
        alive = {row["NodeID"]: row for row in self.ray.nodes() if row["Alive"]}
        for name, row in alive.items():
            if name not in self.known:
                size = row["Resources"]
                self.known[name] = Node(name, row["NodeManagerAddress"], size.get("GPU", 0.0), size.get("CPU", 0.0))
        addresses = [node.name for node in self.known.values()]
        for node in self.known.values():
            if addresses.count(node.name) > 1:  # several on a machine, as in tests
                node.name = f"{node.name}/{node.id[:6]}"
        nodes = [self.known[name] for name in sorted(alive)]
        return [node for node in nodes if node.gpus] or [node for node in nodes if node.cpus]

    def look(self, node: Node) -> None:
        """Asks a node what it is and lacks; `hear` has the answer."""
        here = self.pinned(node)
        looking = self.ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(ray_worker.look)
        node.looking, node.lacks = looking.remote(self.needs), None

    def hear(self, node: Node) -> None:
        """Takes the answer, which has come."""
        try:
            node.environment, node.lacks = self.ray.get(node.looking)
        except self.ray.exceptions.RayError as error:
            node.lacks = [f"cannot run kvbench: {cause(error)}"]
        else:
            node.lacks = differences(self.here, node.environment) + node.lacks
        node.looking = None

    def survey(self) -> list[str]:
        """A line for each thing that a node lacks. Looks at all; one that ends meanwhile is none any more."""
        nodes = self.nodes()
        for node in nodes:
            self.look(node)
        looking = {node.looking: node for node in nodes}
        done, _ = self.ray.wait(list(looking), num_returns=len(looking), timeout=LOOK_SECONDS)
        for answer in done:
            self.hear(looking[answer])
        for node in nodes:
            if node.lacks is None:
                node.lacks = [f"does not answer within {LOOK_SECONDS:.0f} s: no room for a process, or a dead node"]
        alive = {node.id for node in self.nodes()}
        return [f"node {node.name}: {line}" for node in nodes if node.id in alive for line in node.lacks or ()]

    def pinned(self, node: Node) -> Any:
        """Where Ray should run something: there and nowhere else."""
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        return strategies.NodeAffinitySchedulingStrategy(node.id, soft=False)

    @property
    def own_node(self) -> str:
        """The name of the node that this process is on."""
        node: str = self.ray.get_runtime_context().get_node_id()
        return node


def find_cluster(address: str | None) -> str | None:
    """The address as Ray takes it; "local", which starts a cluster, in place of one of this machine that has ended.

    Ray remembers that one, and would try it for minutes.

    Raises:
        ConnectionError, UnusableError: there is none.
    """
    given = address or os.environ.get("RAY_ADDRESS") or None
    check_address(given)
    found = importlib.import_module("ray._private.services").canonicalize_bootstrap_address(address)
    try:
        check_address(found)
    except UnusableError:
        if given:
            raise
        return "local"
    # as it was given: Ray shows the token of this machine's cluster where it finds that by itself, and not at HOST:PORT
    return address if found else "local"


def check_address(address: str | None) -> None:
    """Raises UnusableError where nothing listens at HOST:PORT, which Ray would try for minutes."""
    if address in (None, "auto", "local"):
        return
    host, colon, port = str(address).rpartition(":")
    if "://" in str(address) or not colon or not port.isdecimal():
        raise UnusableError(
            f"--address {address}: expected auto or HOST:PORT of a cluster that this machine is a node of; from "
            "outside, `ray job submit` starts kvbench inside"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UnusableError(f"no Ray cluster at {address}: {error}; `ray start --head` starts one") from None


def differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """A line for each version that is another on a node."""
    lines = []
    own, other = here.get("versions") or {}, there.get("versions") or {}
    pairs = [("Python", here["python"], there["python"]), ("kvbench", here["kvbench"], there["kvbench"])]
    pairs += [(name, own.get(name), other.get(name)) for name in SAME]
    for name, mine, its in pairs:
        if plain(mine) != plain(its):
            lines.append(f"it has {name} {its or 'not at all'}, and this machine {mine or 'not at all'}")
    if not lines and here["source_sha256"] != there["source_sha256"]:
        lines.append("its code of kvbench is another than this machine's; a runtime_env sends it along")
    return lines


def plain(version: str | None) -> str:
    """A version without the build: torch's for a CPU has the same numbers in it as CUDA's."""
    return (version or "").partition("+")[0]


def cause(error: BaseException) -> str:
    """One line for one of Ray's errors, which have many, and guesses in them."""
    text = " ".join(str(error).split())
    _, detail, told = text.partition("Worker exit detail: ")
    return (told.partition(" Some common causes")[0] if detail else text)[:LONGEST_CAUSE] or type(error).__name__


class Ray:
    """See Executor. workers: so many; None: all that the cluster has room for."""

    def __init__(self, address: str | None, workers: int | None, parts: Parts) -> None:
        self.cluster = Cluster(address)
        self.workers = workers
        self.parts = parts

    @property
    def device(self) -> str:
        """See Executor."""
        return "cuda" if any(node.gpus for node in self.cluster.nodes()) else "cpu"

    @property
    def device_name(self) -> str:
        """See Executor."""
        if self.device == "cpu":
            return "cpu"
        self.cluster.survey()
        gpus = [gpu["name"] for node in self.cluster.nodes() for gpu in (node.environment or {}).get("gpus") or ()]
        return " + ".join(dict.fromkeys(gpus)) or "GPU"

    def gpus(self, spec: ModelSpec) -> int:
        """See Executor."""
        return 0 if self.device == "cpu" else max(1, int(spec.gpus))

    def missing(self, cells: Sequence[Cell]) -> list[str]:
        """See Executor."""
        models = list(dict.fromkeys((cell.spec, cell.model) for cell in cells))
        tasks = list({cell.task.name: cell.task for cell in cells}.values())
        self.cluster.needs = ray_worker.Needs(models, tasks, self.parts.find_model)
        nodes = self.cluster.nodes()
        smallest = min((spec.gpus for spec, _ in models), default=1.0)
        room = sum(capacity(node, smallest) for node in nodes)
        what = "GPU" if self.device == "cuda" else "CPU"
        has = sum(node.gpus if what == "GPU" else node.cpus for node in nodes)
        if self.workers is not None and self.workers > room:
            return [f"--workers {self.workers}: the cluster has {has:g} {what}s on {len(nodes)} nodes, room for {room}"]
        return nowhere(models, nodes) + self.cluster.survey()

    def run(self, cells: Sequence[Cell], job: Job, tell: Tell) -> None:
        """See Executor. The cluster may grow and shrink while it runs."""
        errors = self.cluster.ray.exceptions
        try:
            share_out(RayPool(self.cluster, job, self.workers), cells, job, tell, TRIES)
        except errors.RayTaskError:
            raise
        except errors.RayError as error:
            raise UnusableError(f"the Ray cluster is gone: {cause(error)}; finished work is kept") from error
        finally:
            self.cluster.ray.shutdown()


def capacity(node: Node, share: float) -> int:
    """Workers that a node has room for: so many to each GPU, or so many GPUs each; one to a CPU where it has none."""
    if not node.gpus:
        return int(node.cpus)
    return int(node.gpus / share) if share > 1 else int(node.gpus) * int(1 / share + 1e-9)


def nowhere(models: Sequence[tuple[ModelSpec, ModelFacts]], nodes: Sequence[Node]) -> list[str]:
    """A line for each model of several GPUs that no node has, or that asks for one alone."""
    lines = []
    for spec, planned in models:
        what = f"model {planned.name}: device_map: auto goes over the GPUs of its worker"
        if spec.device_map and spec.gpus == 1 and any(node.gpus for node in nodes):
            lines.append(f"{what}: say gpus: N, two at least, or leave it out")
        elif spec.gpus > 1 and not any(capacity(node, spec.gpus) for node in nodes):
            most = max((node.gpus for node in nodes), default=0)
            lines.append(f"{what}, and no node has {spec.gpus:g}: gpus: {most:g} at most")
    return lines


@dataclass
class RaySeat(Seat):
    """A worker in the cluster. answer: to come of it: that it is ready, or its cell."""

    actor: Any = None
    answer: Any = None
    ready: bool = False


@dataclass
class RayPool:
    """See Pool."""

    cluster: Cluster
    job: Job
    limit: int | None
    workers: list[RaySeat] = field(default_factory=list)
    started: int = 0
    failures: int = 0
    look_again: float = 0.0
    idle_since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        assert isinstance(self.job.baselines, Store)
        ray = self.ray = self.cluster.ray
        here = self.cluster.pinned(Node(self.cluster.own_node, "", 0, 0))
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        folder = self.job.baselines.folder.absolute()
        self.keeper = ray.remote(**options, max_concurrency=10_000)(ray_worker.Keeper).remote(folder)
        self.steps = self.keeper.steps.remote()

    def seats(self, queue: Queue) -> Sequence[Seat]:
        """See Pool. Looks for room in the cluster now and then."""
        if queue and time.monotonic() > self.look_again:
            self.look_again = time.monotonic() + GROW_SECONDS
            self._grow(queue)
        return [seat for seat in self.workers if seat.ready]

    def _grow(self, queue: Queue) -> None:
        shares = queue.shares()
        for seat in [one for one in self.workers if one.ready and one.cell is None and not shares[one.share or 1.0]]:
            self.replace(seat)  # its room is for a model that takes another share
        nodes = self.cluster.nodes()
        for node in nodes:
            if node.lacks is None and node.looking is None:
                self.cluster.look(node)
        usable = [node for node in nodes if node.lacks == []]
        for share, left in shares.items():
            free = left - sum(seat.cell is None for seat in self.workers if seat.share == share)
            while free > 0 and (self.limit is None or len(self.workers) < self.limit):
                room = {node.id: self._room(node, share) for node in usable}
                roomiest = max(usable, key=lambda node: room[node.id], default=None)
                if roomiest is None or room[roomiest.id] < 1:
                    break
                self._start(roomiest, share)
                free -= 1
        if self.workers:
            self.idle_since = time.monotonic()
        elif time.monotonic() - self.idle_since > WAIT_SECONDS:
            self.idle_since = time.monotonic()
            logger.warning("no node of the cluster has room for a worker; waiting for one")

    def _room(self, node: Node, share: float) -> int:
        there = [seat for seat in self.workers if seat.node == node.name]
        if not node.gpus:
            return int(node.cpus) - len(there)
        used = sum(seat.share or 1.0 for seat in there)
        return min(capacity(node, share), int((node.gpus - used) / share + 1e-9))

    def _start(self, node: Node, share: float) -> None:
        number, self.started = self.started, self.started + 1
        # numbered as nvidia-smi does, whose names the environment has
        variables = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        variables |= {name: os.environ[name] for name in VARIABLES if name in os.environ and "DEVICES" not in name}
        options = {
            "num_gpus": share if node.gpus else 0,
            "num_cpus": 0 if node.gpus else 1,
            "max_restarts": 0,
            "scheduling_strategy": self.cluster.pinned(node),
            "runtime_env": {"env_vars": variables},
        }
        actor = self.ray.remote(**options)(ray_worker.Worker).remote(self.job, number, share, self.keeper)
        self.workers.append(RaySeat(number, node.name, share, actor=actor, answer=actor.ready.remote()))

    def give(self, seat: Seat, cell: Cell) -> None:
        """See Pool."""
        assert isinstance(seat, RaySeat)
        seat.answer = seat.actor.run.remote(cell)

    def wait(self) -> Iterable[tuple[Seat, Event | Died | Exception]]:
        """See Pool."""
        seats = {seat.answer: seat for seat in self.workers if seat.answer is not None}
        looks = {node.looking: node for node in self.cluster.known.values() if node.looking is not None}
        done, _ = self.ray.wait([*seats, *looks, self.steps], timeout=1.0)
        for answer in done:
            if answer in seats:
                yield from self._hear(seats[answer])
            elif answer in looks:
                node = looks[answer]
                self.cluster.hear(node)
                for line in node.lacks or ():
                    logger.warning("node %s is left out: %s", node.name, line)
            else:
                yield from self._steps()

    def _hear(self, seat: RaySeat) -> Iterator[tuple[Seat, Event | Died | Exception]]:
        try:
            found: Finished | Exception | None = self.ray.get(seat.answer)
        except (
            self.ray.exceptions.RayTaskError
        ) as error:  # neither a cell's fault nor the worker's end: a fault of ours
            yield seat, error
        except self.ray.exceptions.RayError as error:
            if seat.cell is not None:
                yield seat, Died(cause(error))
                return
            self.replace(seat)
            self.failures += 1
            if self.failures >= START_FAILURES:
                yield seat, UnusableError(f"workers do not start in the cluster: on {seat.node}: {cause(error)}")
        else:
            seat.answer, seat.ready = None, True
            self.failures = 0
            if found is not None:
                yield seat, found

    def _steps(self) -> Iterator[tuple[Seat, Event | Died | Exception]]:
        answer, self.steps = self.steps, self.keeper.steps.remote()
        try:
            told = self.ray.get(answer)
        except self.ray.exceptions.RayError:  # the keeper was started again; it tells of what comes
            return
        seats = {seat.number: seat for seat in self.workers}
        for number, cell, step in told:
            seat = seats.get(number)
            if seat is not None and seat.cell is not None and seat.cell.name == cell:
                yield seat, step

    def replace(self, seat: Seat) -> None:
        """See Pool. Where there is room for another, it is found when it is looked for."""
        assert isinstance(seat, RaySeat)
        self.workers.remove(seat)
        self.look_again = 0.0
        self.ray.kill(seat.actor)
        self.keeper.release.remote(seat.number)

    def end(self) -> None:
        """See Pool. The keeper ends with the connection."""
        for seat in self.workers:
            self.ray.kill(seat.actor)


# ---- doctor


def doctor(address: str | None) -> list[Check]:
    """A line for Ray, and one for each node with what it has and lacks.

    Raises:
        UnusableError: there is no cluster.
    """
    cluster = Cluster(address)
    checks = [Check("ray", "ok", f"{cluster.ray.__version__}, Python {sys.version.split()[0]}")]
    cluster.survey()
    for node in cluster.nodes():
        found = node.environment or {}
        gpus = dict.fromkeys(gpu["name"] for gpu in found.get("gpus") or ())
        names = f" ({', '.join(gpus)})" if gpus else ""
        has = f"{node.gpus:g} GPUs{names}, {node.cpus:g} CPUs, {found.get('ram_gib') or '?'} GiB"
        checks.append(Check(f"node {node.name}", "fail" if node.lacks else "ok", has, "; ".join(node.lacks or ())))
    cluster.ray.shutdown()
    return checks
