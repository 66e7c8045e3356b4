"""A model and tasks that take no time: scores fall with the bits, and to nothing where the cache is destroyed.

Run as a script it is `kvbench` over them, for tests that kill it: `python toy.py sweep CONFIG --output DIR`.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvbench.results import Metric, Outcome
from kvbench.runners.base import ModelInfo
from kvbench.schemes import Scheme
from kvbench.sweep import session
from kvbench.sweep.parts import ModelFacts, Parts
from kvbench.tasks.base import RunContext, Work

LAYERS = ((2, 64),) * 3
MODELS = {"toy": "r1", "other": "r2", "blind": "r3"}  # the last does not read its cache


@dataclass
class ToyRunner:
    scheme: Scheme
    destroyed: bool
    info: ModelInfo
    tokenizer: Any = None
    nudge: int = 0

    @property
    def quality(self) -> float:
        return 0.0 if self.destroyed else self.scheme.bits_per_value(64) / 16

    def stats(self) -> dict[str, float]:
        bytes_per_token = self.scheme.resolve(torch.float32).token_bytes(LAYERS)
        return {"kv_bytes_per_token": bytes_per_token, "prefill_tokens": 100, "prefill_seconds": 0.5}


@dataclass
class ToyModel:
    info: ModelInfo
    reads_cache: bool = True
    runners: list[ToyRunner] = field(default_factory=list)

    def learn(self, scheme: Scheme) -> dict[str, torch.Tensor]:
        name = "offset" if "center" in scheme.rotation_name else "order"
        return {f"0.0.0.{name}": torch.ones(1, 2, 64)}

    def runner(
        self,
        scheme: Scheme,
        *,
        page_size: int,
        scoring: str,
        attention: str,
        destroyed: bool,
        learned: Any = None,
        nudge: int = 0,
    ) -> ToyRunner:
        runner = ToyRunner(scheme, destroyed and self.reads_cache, self.info, nudge=nudge)
        self.runners.append(runner)
        return runner


@dataclass(frozen=True)
class ToyTask:
    name: str
    limit: int | None = None
    n: int = 50
    seconds: float = 0.0
    fails: str = ""
    lacks: str = ""
    log: str = ""
    swallows: str = ""
    dies: str = ""
    once: str = ""
    breaks: str = ""
    fills: str = ""
    holds: str = ""
    timed: bool = False
    tokens: int | None = None

    def identity(self) -> dict[str, Any]:
        return {"task": self.name, "limit": self.limit, "n": self.n}

    def answers(self) -> int:
        return min(self.n, self.limit or self.n)

    def longest(self) -> int | None:
        return self.tokens

    def work(self) -> Work | None:
        return Work(self.tokens * self.n) if self.tokens else None

    def needs(self) -> frozenset[str]:
        return frozenset()

    def metrics(self) -> tuple[str, ...]:
        return "acc", "kld"

    def doubts(self) -> list[str]:
        return []

    def texts(self) -> dict[Any, Any]:
        return {}

    def missing(self) -> list[str]:
        return [self.lacks] if self.lacks else []

    def _exact(self, runner: Any) -> dict[str, torch.Tensor]:
        if self.log:
            with Path(f"{self.log} of the baseline").open("a") as file:
                file.write(f"{self.name}\n")
        time.sleep(self.seconds)
        return {"quality": torch.tensor([runner.quality])}

    def run(self, runner: Any, context: RunContext) -> Outcome:
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(f"{self.name} {runner.scheme.dtype_name}\n")
            with Path(f"{self.log} of the processes").open("a") as file:
                file.write(f"{os.getpid()}\n")
        if self.dies and self.dies in runner.scheme.dtype_name and not (self.once and Path(self.once).exists()):
            if self.once:
                Path(self.once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.breaks and self.breaks in runner.scheme.dtype_name:
            session.is_broken = lambda: True
            raise RuntimeError("device-side assert triggered")
        if self.fills and self.fills in runner.scheme.dtype_name:
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere/model")
            except OSError as error:
                raise ValueError("the model cannot be converted") from error
        if self.fails and self.fails in runner.scheme.dtype_name:
            raise RuntimeError(f"no {self.fails} today")
        if self.swallows and self.swallows in runner.scheme.dtype_name:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            except KeyboardInterrupt:
                raise ValueError("what a library made of it") from None
        while self.holds and not Path(self.holds).exists():
            time.sleep(0.02)
        base = context.baseline("quality", self._exact)["quality"]
        for step in range(5):
            time.sleep(self.seconds / 5)
            context.progress(step + 1, 5)
        score = runner.quality
        n = min(self.n, self.limit or self.n)
        kld = max(0.0, float(base[0]) - score) * 3
        samples = [
            {
                "doc_id": i,
                "doc_hash": f"d{i}",
                "prompt_hash": f"p{i}",
                "filter": "none",
                "acc": float(i < score * n),
                "kld": kld * (0.5 + i / (n - 1)),
            }
            for i in range(n)
        ]
        metrics = (
            Metric("acc", sum(row["acc"] for row in samples) / n, 0.02, n, "", True, "share", when_zeroed="falls"),
            Metric("kld", kld, 0.001, n, "nats", False, "distance", when_zeroed="rises"),
            Metric("kld_max", 9.0, None, n, "nats", False, headline=False),
        )
        return Outcome(metrics, samples, {"documents_sha256": "abc"})


def find_model(spec: Any) -> ModelFacts:
    dtype = spec.compute_dtype or "float32"
    if spec.name == "absent":
        return ModelFacts("absent", dtype, missing="fetch it from somewhere")
    if spec.name not in (*MODELS, "odd"):
        raise ValueError(f"unknown model '{spec.name}': did you mean toy?")
    return ModelFacts(spec.name, dtype, MODELS.get(spec.name), ((2, 63),) if spec.name == "odd" else LAYERS, 1024)


def fetch_model(spec: Any) -> None:
    raise ValueError(f"model {spec.name}: fetch it from somewhere")


def open_model(spec: Any, compute_dtype: str, device: str) -> ToyModel:
    reads_cache = "TOY_IGNORES_CACHE" not in os.environ and spec.name != "blind"
    return ToyModel(ModelInfo(spec.name, MODELS[spec.name], compute_dtype, LAYERS, 1024), reads_cache)


def make_task(spec: Any, data: Path | None) -> ToyTask:
    options = {"task": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("task")
    if not name.startswith("toy"):
        raise ValueError(f"unknown task '{name}': did you mean toy?")
    unknown = set(options) - set(ToyTask.__dataclass_fields__)
    if unknown:
        raise ValueError(f"task {name}: unknown option '{unknown.pop()}'")
    return ToyTask(name, **options)


PARTS = Parts(find_model, fetch_model, open_model, make_task)


def write_config(path: Path, **changes: Any) -> Path:
    """A sweep of the toy model, written as YAML (JSON is YAML)."""
    config = {"name": "toys", "model": "toy", "dtypes": ["fp16", "int8", "int4", "int2"], "tasks": ["toy_a", "toy_b"]}
    path.write_text(json.dumps({**config, **changes}, indent=1))
    return path


def kvbench(arguments: list[str], errors: Path | None = None) -> None:
    """The command over the toys, in a process group of its own where its stderr goes to a file."""
    import kvbench.sweep.command
    from kvbench.cli import main

    if errors is not None:
        os.setpgrp()
        for number, path in ((1, errors.with_name("stdout")), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.argv = ["kvbench", *arguments]
    kvbench.sweep.command.REAL = PARTS
    main()


if __name__ == "__main__":
    kvbench(sys.argv[1:])
