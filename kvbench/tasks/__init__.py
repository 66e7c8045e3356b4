"""Tasks by name: ours and lm-eval's. A config is validated here without loading lm-eval or torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kvbench.messages import path_text, wrong
from kvbench.tasks import lm_eval_index
from kvbench.tasks.base import Options, RunContext, Task
from kvbench.tasks.divergence import Divergence
from kvbench.tasks.layers import Layers
from kvbench.tasks.lm_eval import LmEval
from kvbench.tasks.needle import Needle
from kvbench.tasks.throughput import Throughput

__all__ = ["RunContext", "Task", "TaskInfo", "list_tasks", "make_task", "of_identity"]

OURS: dict[str, type[Divergence | Layers | Needle | Throughput]] = {
    "divergence": Divergence,
    "layers": Layers,
    "needle": Needle,
    "throughput": Throughput,
}


class OptionError(ValueError):
    """A task's option that cannot be; loc: where it stands in the entry. unknown: it is the key that is wrong."""

    def __init__(self, message: str, loc: tuple[str | int, ...], unknown: bool) -> None:
        super().__init__(message)
        self.loc, self.unknown = loc, unknown


@dataclass(frozen=True)
class TaskInfo:
    """A task's entry in a listing. source: who made it. kind: "task", or lm-eval's "group" or "tag" of several."""

    name: str
    kind: Literal["task", "group", "tag"]
    source: Literal["kvbench", "lm-eval"]
    description: str = ""


def make_task(spec: str | dict[str, Any], data: Path | None = None) -> Task:
    """The task that a config's entry names: `arc_easy`, or `{task: gsm8k, num_fewshot: 5, limit: 250}`.

    data: the offline mirror's folder.

    Raises:
        ValueError: no such task, no such option, or a bad value; the message names the nearest good one.
    """
    options = {"task": spec} if isinstance(spec, str) else dict(spec)
    task = options.get("task")
    if not isinstance(task, str):
        raise ValueError(f"a task is a name, or a mapping with `task: NAME`, not {spec!r}")
    kind: type[Options] = OURS.get(task, LmEval)
    if task in OURS:
        del options["task"]
    elif task not in lm_eval_index.index():
        raise ValueError(f"unknown task '{task}': {_nearest(task, [*OURS, *lm_eval_index.index()])}")
    else:
        # tables tell a task's chat from its plain prompts by name
        name = f"{task}-chat" if options.get("apply_chat_template") is True else task
        options = {"name": name, "data": data, **options}
    try:
        return kind.model_validate(options)  # type: ignore[return-value]
    except ValidationError as error:
        first = error.errors()[0]
        raise OptionError(
            f"task {task}: {_explain(first, kind)}", first["loc"], first["type"] == "extra_forbidden"
        ) from error


def of_identity(identity: Mapping[str, Any], data: Path | None = None) -> Task:
    """The task of a record, by what its identity says of it; with the rows of a folder `data`, which may be others.

    Raises:
        ValueError: no such task here.
    """
    name = str(identity.get("task"))
    fields = OURS.get(name, LmEval).model_fields.keys() - {"data", "text"}
    return make_task(
        {key: value for key, value in identity.items() if key in fields and value is not None} | {"task": name}, data
    )


def list_tasks() -> list[TaskInfo]:
    """Every task that `make_task` takes: ours first, then lm-eval's tasks, groups and tags by name."""
    ours = [TaskInfo(name, "task", "kvbench", (kind.__doc__ or "").split("\n")[0]) for name, kind in OURS.items()]
    shipped = {name: entry for name, entry in lm_eval_index.scan(lm_eval_index.OURS).items() if entry.path}
    ours += [
        TaskInfo(name, entry.kind, "kvbench", lm_eval_index.config(Path(str(entry.path)))["metadata"]["description"])
        for name, entry in shipped.items()
    ]
    theirs = sorted(entry.name for entry in lm_eval_index.index().values() if entry.name not in shipped)
    return ours + [TaskInfo(name, lm_eval_index.index()[name].kind, "lm-eval") for name in theirs]


def _explain(first: ErrorDetails, kind: type[Options]) -> str:
    where = path_text(first["loc"])
    if first["type"] == "extra_forbidden":
        known = sorted(set(kind.model_fields) - {"task"})
        return f"unknown option '{where}': {_nearest(where, known) or ''}".rstrip(": ")
    return f"{where}: {wrong(first)}" if where else wrong(first)


def _nearest(text: str, names: Iterable[str]) -> str:
    known = list(names)
    near = difflib.get_close_matches(text, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"one of {', '.join(known)}" if len(known) < 20 else "see `kvbench ls tasks`"
