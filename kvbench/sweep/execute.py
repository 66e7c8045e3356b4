"""Running the cells of a sweep, one after another: what fails is recorded, what is finished is kept."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from kvbench.results import Outcome, Record, Store, Tensors, describe
from kvbench.runners.base import GenerateRequest, Generation, ModelInfo, Progress, Runner, Score, ScoreRequest
from kvbench.schemes import Scheme
from kvbench.sweep.again import Shuffled
from kvbench.sweep.canary import Judgement, judge_all
from kvbench.sweep.parts import REAL, LoadedModel, ModelFacts, Parts
from kvbench.sweep.plan import Cell
from kvbench.sweep.progress import Display
from kvbench.tasks.base import RunContext


class NotInEffectError(RuntimeError):
    """A destroyed cache left the scores where they were: nothing that this sweep measures means anything."""


@dataclass
class Timed:
    """A runner that counts what it is asked for. Everything else is the runner's own."""

    runner: Runner
    seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    info: ModelInfo = field(init=False)
    tokenizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.info = self.runner.info
        self.tokenizer = self.runner.tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    def score(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> list[Score]:
        """As the runner's."""
        self.prompt_tokens += sum(len(r.context) + len(r.continuation) for r in requests)
        with self._timed():
            return self.runner.score(requests, progress)

    def hidden_states(self, documents: Sequence[Sequence[int]], progress: Progress | None = None) -> list[Any]:
        """As the runner's."""
        self.prompt_tokens += sum(map(len, documents))
        with self._timed():
            return self.runner.hidden_states(documents, progress)

    def log_probs(self, hidden: Any) -> Any:
        """As the runner's."""
        with self._timed():
            return self.runner.log_probs(hidden)

    def generate(self, requests: Sequence[GenerateRequest], progress: Progress | None = None) -> list[Generation]:
        """As the runner's."""
        self.prompt_tokens += sum(len(r.prompt) for r in requests)
        with self._timed():
            generations = self.runner.generate(requests, progress)
        self.generated_tokens += sum(len(generation.tokens) for generation in generations)
        return generations

    def timings(self) -> dict[str, float]:
        """Seconds in the model, tokens asked for (a shared prefix as often as it is asked for), and tokens made."""
        row: dict[str, float] = {"model_seconds": round(self.seconds, 3)}
        if self.prompt_tokens:
            row["prompt_tokens"] = self.prompt_tokens
        if self.generated_tokens:
            row["generated_tokens"] = self.generated_tokens
        if self.seconds > 0 and not self.generated_tokens:
            row["prompt_tokens_per_s"] = round(self.prompt_tokens / self.seconds, 1)
        if self.seconds > 0 and self.generated_tokens:
            row["generated_tokens_per_s"] = round(self.generated_tokens / self.seconds, 2)
        return row


def execute(
    cells: Sequence[Cell],
    store: Store,
    display: Display,
    *,
    baseline: Scheme,
    page_size: int,
    device: str,
    environment: dict[str, Any],
    parts: Parts = REAL,
) -> None:
    """Measures the cells and keeps each as it is done; a cell that raises is kept with its error.

    The caller holds `store.writing()`.

    Raises:
        NotInEffectError: a canary was not wrecked; the cells before it are kept.
        KeyboardInterrupt: it was stopped; finished cells are kept.
    """
    for _, group in groupby(cells, key=lambda cell: (cell.spec, cell.model)):
        of_model = list(group)
        display.loading(of_model[0].model.name)
        began = time.perf_counter()
        try:
            model = parts.open_model(of_model[0].spec, of_model[0].model.compute_dtype, device)
            check_revision(of_model[0].model, model.info)
        except Exception as error:
            raise_if_stopped()
            for cell in of_model:
                display.started(cell)
                keep(store, display, cell, failed(cell, error, environment, 0.0), None)
            continue
        session = Session(model, store, display, baseline, page_size, environment)
        session.load_seconds = time.perf_counter() - began
        for index, cell in enumerate(of_model):
            session.run(cell)
            raise_if_stopped()
            following = of_model[index + 1] if index + 1 < len(of_model) else None
            if cell.canary and not (following and following.canary):
                stop_unless_wrecked(store, cell)
        del model, session
        gc.collect()  # its memory is free before the next model is loaded


def check_revision(planned: ModelFacts, loaded: ModelInfo) -> None:
    """Raises ValueError where the loaded model is not the one that the cells are named for."""
    if planned.revision != loaded.revision:
        raise ValueError(f"model {loaded.name} changed while it was planned: {planned.revision} -> {loaded.revision}")


@dataclass
class Session:
    """One loaded model and the cells that run on it."""

    model: LoadedModel
    store: Store
    display: Display
    baseline: Scheme
    page_size: int
    environment: dict[str, Any]
    load_seconds: float = 0.0

    def run(self, cell: Cell) -> None:
        """Measures a cell and keeps it."""
        self.display.started(cell)
        began = time.perf_counter()
        try:
            seed = cell.seed + 1 if cell.again else cell.seed
            plain = self._runner(cell, cell.scheme, destroyed=cell.canary)
            runner = Timed(Shuffled(plain, seed) if cell.again else plain)
            context = RunContext(self._baseline(cell), self.display.advanced, seed)
            outcome = cell.task.run(runner, context)
        except Exception as error:
            raise_if_stopped()
            keep(
                self.store, self.display, cell, failed(cell, error, self.environment, time.perf_counter() - began), None
            )
            return
        timings = {
            "seconds": round(time.perf_counter() - began, 3),
            "model_load_seconds": round(self.load_seconds, 3),
            **runner.timings(),
        }
        record = Record(
            status="done",
            model=asdict(self.model.info),
            metrics=outcome.metrics,
            facts=outcome.facts,
            environment=self.environment,
            timings=timings,
            **described(cell),
        )
        keep(self.store, self.display, cell, record, outcome)

    def _runner(self, cell: Cell, scheme: Scheme, destroyed: bool) -> Runner:
        return self.model.runner(scheme, page_size=self.page_size, scoring=cell.scoring, destroyed=destroyed)

    def _baseline(self, cell: Cell) -> Callable[[str, Callable[[Runner], Tensors]], Tensors]:
        def baseline(key: str, compute: Callable[[Runner], Tensors]) -> Tensors:
            identity = {
                "model": cell.identity["model"],
                "scheme": {"dtype": self.baseline.dtype_name, "rotation": self.baseline.rotation_name},
                "scoring": cell.scoring,
                "seed": cell.seed,
                "key": key,
            }
            slug = f"{cell.model.name.rsplit('/', 1)[-1]}-{key}"
            return self.store.baseline(
                identity, slug, lambda: compute(self._runner(cell, self.baseline, destroyed=False))
            )

        return baseline


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


def keep(store: Store, display: Display, cell: Cell, record: Record, outcome: Outcome | None) -> None:
    """Writes a record, then shows it."""
    store.save(record, outcome.samples if outcome else [])
    display.finished(cell, record)


def stop_unless_wrecked(store: Store, canary: Cell) -> None:
    """Raises NotInEffectError where a canary of this cell's model left the scores where they were."""
    unmoved = [
        judgement
        for judgement in judge_all(list(store.load().records.values()))
        if judgement.verdict == "unmoved" and judgement.model == canary.model.name
    ]
    if unmoved:
        raise NotInEffectError(not_in_effect(unmoved))


def not_in_effect(unmoved: Sequence[Judgement]) -> str:
    """What a person reads when the canary lives."""
    shown = "; ".join(f"{one.model}, {one.task}: {one.why}" for one in unmoved)
    return f"quantization not in effect: with a destroyed cache the scores stay where they were ({shown})"


_stopped = threading.Event()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM stops the block as Ctrl-C does, and `raise_if_stopped` knows of either."""

    def stop(*_: object) -> None:
        _stopped.set()
        raise KeyboardInterrupt

    _stopped.clear()
    before = {kind: signal.signal(kind, stop) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def raise_if_stopped() -> None:
    """Raises KeyboardInterrupt once a stop was asked for: compiled code may have made another error of it, or none."""
    if _stopped.is_set():
        raise KeyboardInterrupt
