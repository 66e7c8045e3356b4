"""What a process measures: its model stays loaded while cells of it follow each other, and each gives a record."""

from __future__ import annotations

import contextlib
import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from kvbench.environment import own_gpus, visible_gpu, visible_gpus
from kvbench.results import Record, Tensors, describe
from kvbench.results.record import checksum
from kvbench.runners.base import (
    GenerateRequest,
    Generation,
    LoadedModel,
    Measuring,
    ModelInfo,
    Next,
    NextRequest,
    Progress,
    Runner,
    Score,
    ScoreRequest,
    ScoreRequests,
    Scores,
)
from kvbench.runners.learned import digest, forms
from kvbench.runners.model_files import RefusedError
from kvbench.schemes import Scheme
from kvbench.sweep.again import Around, Shuffled
from kvbench.sweep.agreement import key_of
from kvbench.sweep.job import Advanced, Finished, Job, Loading, Started, Step
from kvbench.sweep.parts import ModelFacts
from kvbench.sweep.plan import Cell
from kvbench.sweep.spec import ModelSpec
from kvbench.sweep.stopping import raise_if_stopped, raise_if_the_machine_s
from kvbench.tasks.base import RunContext, SideName

LEARNING_VERSION = 1  # raised when the same text comes to teach something else


NOT_FINITE = (
    "a log-likelihood is not finite: the model gives no probabilities under this scheme; its weights may be damaged, "
    "or too large for its compute_dtype"
)


@dataclass
class Timed(Around):
    """A runner that counts what it is asked for. Everything else is the runner's own."""

    seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    def score(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> Sequence[Score]:
        """As the runner's."""
        requests = ScoreRequests.of(requests)
        self.prompt_tokens += len(requests.tokens)
        with self._timed():
            scores = self.runner.score(requests, progress)
        if not Scores.of(scores).logprobs.isfinite().all():
            raise ValueError(NOT_FINITE)
        return scores

    def hidden_states(self, documents: Sequence[Sequence[int]], progress: Progress | None = None) -> list[Any]:
        """As the runner's."""
        self.prompt_tokens += sum(map(len, documents))
        with self._timed():
            return self.runner.hidden_states(documents, progress)

    def next_tokens(self, requests: Sequence[NextRequest], progress: Progress | None = None) -> list[Next]:
        """As the runner's."""
        self.prompt_tokens += sum(len(r.tokens) for r in requests)
        with self._timed():
            found = self.runner.next_tokens(requests, progress)
        if not all(bool(one.following.isfinite().all()) for one in found):
            raise ValueError(NOT_FINITE)
        return found

    def log_probs(self, hidden: Any) -> Any:
        """As the runner's."""
        with self._timed():
            log_p = self.runner.log_probs(hidden)
        if bool(log_p.isnan().any()):
            raise ValueError(NOT_FINITE)
        return log_p

    def generate(self, requests: Sequence[GenerateRequest], progress: Progress | None = None) -> list[Generation]:
        """As the runner's."""
        self.prompt_tokens += sum(len(r.prompt) for r in requests)
        with self._timed():
            generations = self.runner.generate(requests, progress)
        self.generated_tokens += sum(len(generation.tokens) for generation in generations)
        return generations

    def timings(self) -> dict[str, float]:
        """Seconds in the model, tokens asked for (a shared prefix as often as it is asked for), and tokens made.

        Then what the runner itself measured.
        """
        row: dict[str, float] = {"model_seconds": round(self.seconds, 3)}
        if self.prompt_tokens:
            row["prompt_tokens"] = self.prompt_tokens
        if self.generated_tokens:
            row["generated_tokens"] = self.generated_tokens
        if self.seconds > 0 and not self.generated_tokens:
            row["prompt_tokens_per_s"] = round(self.prompt_tokens / self.seconds, 1)
        if self.seconds > 0 and self.generated_tokens:
            row["generated_tokens_per_s"] = round(self.generated_tokens / self.seconds, 2)
        return {**row, **(self.runner.stats() if isinstance(self.runner, Measuring) else {})}


class Bench:
    """Runs cells one after another, and keeps their model loaded as long as it is the same."""

    def __init__(self, job: Job, tell: Callable[[Step], None]) -> None:
        self.job = job
        self.tell = tell
        self.model: tuple[ModelSpec, ModelFacts] | None = None
        self.session: Session | Exception | None = None

    def run(self, cell: Cell) -> Finished:
        """What a cell gave, or its error where it raises.

        Raises:
            RefusedError: its model would be measured wrongly.
            OSError: a disk is full.
            UnusableError: Triton can't use its cache, or build what launches kernels.
            KeyboardInterrupt: it was stopped.
        """
        if (cell.spec, cell.model) != self.model:
            self._open(cell)
        if isinstance(self.session, Session):
            return self.session.run(cell)
        assert self.session is not None
        self.tell(Started(cell.name))
        return Finished(failed(cell, self.session, on_its_gpus(self.job, cell.spec).environment, 0.0), [], is_broken())

    def _open(self, cell: Cell) -> None:
        self.session = None
        gc.unfreeze()
        gc.collect()  # the last model's memory is free before the next is loaded
        self.tell(Loading(cell.model.name))
        began = time.perf_counter()
        try:
            model = self.job.parts.open_model(cell.spec, cell.model.compute_dtype, self.job.device)
            job = on_its_gpus(self.job, cell.spec)
            check_revision(cell.model, model.info)
            loaded = time.perf_counter() - began
            self.session = Session(model, job, self.tell, loaded, self._agreement(cell, model, job))
        except RefusedError:
            raise_if_stopped()
            raise
        except Exception as error:
            raise_if_stopped()
            raise_if_the_machine_s(error)
            self.session = error
        self.model = (cell.spec, cell.model)

    def _agreement(self, cell: Cell, model: LoadedModel, job: Job) -> dict[str, Any] | None:
        """How the exact cache agrees with the model, as is known already or as is found now."""
        if not job.agreement or job.parts.compare is None or "agreement" not in cell.model.runs_on.gives:
            return None
        place = {"device": job.device, "attention": job.attention, "page_size": job.page_size}
        if cell.spec.device_map:
            place["device_map"] = f"{cell.spec.device_map} over {len(job.environment.get('gpus') or [])}"
        key = key_of(cell.identity["model"], place, job.environment)
        return job.known.get(key) or {**job.parts.compare(model, job.page_size, job.attention), "key": key}


def on_its_gpus(job: Job, spec: ModelSpec) -> Job:
    """The job with the GPUs alone in its environment that this process runs a model on: its first, or all.

    One that no number tells is that which CUDA names.
    """
    gpus = job.environment.get("gpus") or []
    if job.device == "cpu" or len(gpus) < 2:
        return job
    if spec.device_map:
        return replace(job, environment={**job.environment, "gpus": visible_gpus(gpus)})
    own = own_gpus(gpus, visible_gpu("cuda"))
    with contextlib.suppress(RuntimeError):  # a GPU that can't be used is the first cell's error
        if len(own) > 1:
            name = torch.cuda.get_device_name()
            own = [gpu for gpu in gpus if gpu["name"] == name][:1] or gpus
    return replace(job, environment={**job.environment, "gpus": own})


def clear_garbage() -> None:
    """Collects what earlier cells left, and spares what is still there all later collections.

    With lm-eval's tasks and a model loaded, a collection while a cell runs would take a tenth of a second and more.
    """
    gc.collect()
    gc.freeze()


def check_revision(planned: ModelFacts, loaded: ModelInfo) -> None:
    """Raises ValueError where the loaded model is not the one that the cells are named for."""
    for name in ("revision", "name", "compute_dtype"):
        before, now = getattr(planned, name), getattr(loaded, name)
        if before != now:
            raise ValueError(f"model {loaded.name} changed while it was planned: {before} -> {now}")


@dataclass
class Session:
    """One loaded model and the cells that run on it."""

    model: LoadedModel
    job: Job
    tell: Callable[[Step], None]
    load_seconds: float
    agreement: dict[str, Any] | None = None
    taught: dict[str, dict[str, Any]] = field(default_factory=dict)  # by scheme: what it learned, for the records
    last: tuple[str, Tensors] | None = None  # what was learned last, by a hash of all that decides it
    kept: dict[str, Any] = field(default_factory=dict)  # see RunContext

    def run(self, cell: Cell) -> Finished:
        """What a cell gave, or its error where it raises."""
        self.tell(Started(cell.name))
        began = time.perf_counter()
        environment, on_gpu = self.job.environment, self.job.device != "cpu"
        try:
            clear_garbage()  # the last cell's cache
            if on_gpu:
                torch.cuda.empty_cache()
                for gpu in range(torch.cuda.device_count()):
                    torch.cuda.reset_peak_memory_stats(gpu)
            other = cell.again and not cell.task.timed and not cell.nudge
            seed = cell.seed + 1 if other else cell.seed
            own = self._runner(cell, cell.scheme, destroyed=cell.canary, nudge=cell.nudge)
            runner = Timed(own)
            context = RunContext(
                self._baseline(cell),
                lambda done, total: self.tell(Advanced(done, total)),
                seed,
                lambda layer, side: self._alone(cell, own, layer, side),
                self.kept,
            )
            outcome = cell.task.run(Shuffled(runner, seed) if other else runner, context)
            timings = {
                "seconds": round(time.perf_counter() - began, 3),
                "model_load_seconds": round(self.load_seconds, 3),
                **runner.timings(),
            }
            # an engine that does not say what it does takes all memory at once
            if on_gpu and "clock" in cell.model.runs_on.gives:
                # of the fullest GPU, where it has several
                timings["peak_memory_bytes"] = max(
                    map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))
                )
        except Exception as error:
            raise_if_stopped()
            raise_if_the_machine_s(error)
            return Finished(failed(cell, error, environment, time.perf_counter() - began), [], is_broken())
        agreed = {"agreement": self.agreement} if self.agreement else {}
        record = Record(
            status="done",
            model=asdict(self.model.info),
            metrics=outcome.metrics,
            facts={
                **outcome.facts,
                **odd_size(cell, timings),
                "attention": getattr(runner, "attention", None),
                **({"kernels_lack": lack} if (lack := getattr(runner, "kernels_lack", "")) else {}),
                **({"learned": self.taught[cell.scheme.label]} if cell.scheme.learns else {}),
                **agreed,
            },
            environment=environment,
            timings=timings,
            **described(cell),
        )
        return Finished(record, outcome.samples)

    def _alone(self, cell: Cell, own: Runner, layer: int | None, side: SideName) -> Runner:
        """See RunContext; what the cell's scheme learned is taken, and its runner's attention."""
        scheme = cell.scheme.alone(layer, len(own.info.layers), side)
        attention = getattr(own, "attention", None)
        return self._runner(cell, scheme, taught=cell.scheme, destroyed=cell.canary, attention=attention)

    def _runner(
        self,
        cell: Cell,
        scheme: Scheme,
        *,
        taught: Scheme | None = None,
        destroyed: bool = False,
        nudge: int = 0,
        attention: str | None = None,
    ) -> Runner:
        options: dict[str, Any] = {"learned": self._learned(cell, taught or scheme)} if scheme.learns else {}
        return self.model.runner(
            scheme,
            page_size=self.job.page_size,
            scoring=cell.scoring,
            attention=attention or self.job.attention,
            destroyed=destroyed,
            nudge=nudge,
            **options,
        )

    def _learned(self, cell: Cell, scheme: Scheme) -> Tensors:
        """What the scheme learned of the model, kept in the run folder: once for all that learn the same."""
        seconds: list[float] = []

        def learn() -> Tensors:
            began = time.perf_counter()
            tensors = self.model.learn(scheme)
            seconds.append(round(time.perf_counter() - began, 3))
            return tensors

        identity = {
            "version": LEARNING_VERSION,
            "model": cell.identity["model"],
            **scheme.learning(),
        }
        key = checksum(identity)
        if self.last is None or self.last[0] != key:  # a cell that measures layers alone asks for each of them
            slug = f"{cell.model.name.rsplit('/', 1)[-1]}-{scheme.rotation_name}-learned"
            self.last = key, self.job.baselines.baseline(identity, slug, learn)
        tensors = self.last[1]
        if scheme.label in self.taught:
            return tensors
        self.taught[scheme.label] = {
            **scheme.learning()["calibration"],
            "sha256": digest(tensors),
            **({"means": means} if (means := forms(tensors)) else {}),
            **({"seconds": seconds[0]} if seconds else {}),
        }
        return tensors

    def _baseline(self, cell: Cell) -> Callable[[str, Callable[[Runner], Tensors]], Tensors]:
        scheme = self.job.baseline

        def baseline(key: str, compute: Callable[[Runner], Tensors]) -> Tensors:
            identity = {
                "model": cell.identity["model"],
                "scheme": scheme.identity(),
                "scoring": cell.scoring,
                "seed": cell.seed,
                "key": key,
            }
            slug = f"{cell.model.name.rsplit('/', 1)[-1]}-{key}"
            return self.job.baselines.baseline(identity, slug, lambda: compute(self._runner(cell, scheme)))

        return baseline


def odd_size(cell: Cell, timings: dict[str, float]) -> dict[str, str]:
    """A fact for the record where the cache takes other bytes a token than the dtype says; else none."""
    computed, measured = cell.kv_bytes_per_token, timings.get("kv_bytes_per_token")
    if computed is None or measured is None or measured == computed:
        return {}
    return {"kv_bytes": f"{measured:g} bytes a token measured, {computed} computed"}


def is_broken() -> bool:
    """Whether this process can't use its GPU any more, as after an illegal access of a kernel."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def described(cell: Cell) -> dict[str, Any]:
    """What a record says of its cell."""
    return {
        "cell": cell.name,
        "identity": cell.identity,
        "dtype": cell.dtype,
        "rotation": cell.rotation,
        "task": cell.task.name,
        "scoring": cell.scoring,
        "bits_per_value": cell.bits_per_value if cell.model.layers else None,
        "kv_bytes_per_token": cell.kv_bytes_per_token,
        "limit": cell.limit,
    }


def failed(cell: Cell, error: Exception, environment: dict[str, Any], seconds: float) -> Record:
    """The record of a cell that raised."""
    return Record(
        status="failed",
        model={name: value for name, value in asdict(cell.model).items() if name != "missing"},
        environment=environment,
        timings={"seconds": round(seconds, 3)},
        error=f"{type(error).__name__}: {describe(error)}",
        traceback="".join(traceback.format_exception(error)),
        **described(cell),
    )
