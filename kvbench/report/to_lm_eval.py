"""A run folder as lm-eval writes results, a file a scheme with its samples, for tools that read those. No torch."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from itertools import repeat
from pathlib import Path
from typing import Any

from kvbench.files import write_text
from kvbench.report.by_scheme import Scheme, by_scheme
from kvbench.results import Record, Store, plain_json


def export(folder: Path, place: Path) -> list[Path]:
    """Writes `MODEL__DTYPE__ROTATION/results_DATE.json` and `samples_TASK_DATE.jsonl` for each scheme; returns them.

    A quick look has a folder of its own, `…__limit-50`, and so have cells of another seed or of other weights. Only
    cells of lm-eval's tasks have a place there, controls included. A sample has no text of its document, which kvbench
    does not keep: `doc` is empty, and the hashes say which it was.

    Raises:
        FileNotFoundError, NotARunError: no run folder, or none with such a cell.
        OSError: a file that can't be written.
    """
    store, schemes = by_scheme(folder, _of_lm_eval, "a task of lm-eval")
    written = []
    for scheme in schemes:
        records, name = scheme.records, "__".join(map(_sanitized, scheme.names))
        below = place / name
        below.mkdir(parents=True, exist_ok=True)
        date = _date(max(record.finished for record in records))
        file = below / f"results_{date}.json"
        write_text(file, json.dumps(plain_json(_results(name, scheme)), indent=2, ensure_ascii=False) + "\n")
        written.append(file)
        for record in records:
            for task, lines in _samples(store, record, scheme.labels[record.cell]):
                path = below / f"samples_{_sanitized(task)}_{date}.jsonl"
                write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                written.append(path)
    return written


def _of_lm_eval(record: Record) -> bool:
    task = record.identity.get("task")
    return record.status == "done" and isinstance(task, dict) and "lm_eval" in task


def _sanitized(text: str) -> str:
    """As lm-eval makes a folder of a model's name."""
    return re.sub(r"[\"<>:/|\\?*\[\]]+", "__", text)


def _date(finished: str) -> str:
    """As lm-eval writes it into a file's name."""
    return datetime.fromisoformat(finished).replace(tzinfo=None).isoformat(timespec="microseconds").replace(":", "-")


def _results(name: str, scheme: Scheme) -> dict[str, Any]:
    model, dtype, rotation, records = scheme.model, scheme.dtype, scheme.rotation, scheme.records
    first = records[0]
    found: dict[str, Any] = {key: {} for key in ("results", "group_subtasks", "configs", "versions", "n-shot")}
    found |= {"higher_is_better": {}, "n-samples": {}, "task_hashes": {}}
    for record in records:
        task, called = record.identity["task"], scheme.labels[record.cell]
        for metric in record.metrics:
            leaf, _, label = metric.name.rpartition("/")
            label, _, filter_name = label.partition(",")
            filter_name = filter_name or "none"
            place = _called(leaf or record.task, record, called)
            row = found["results"].setdefault(place, {"alias": place})
            row[f"{label},{filter_name}"] = metric.value
            row[f"{label}_stderr,{filter_name}"] = "N/A" if metric.stderr is None else metric.stderr
            found["higher_is_better"].setdefault(place, {})[label] = metric.higher_is_better
            found["n-samples"][place] = {"original": metric.n, "effective": metric.n}
        found["group_subtasks"][called] = []
        found["configs"][called] = {
            "task": record.task,
            "num_fewshot": task.get("num_fewshot"),
            "metadata": {**(task.get("metadata") or {}), "limit": task.get("limit")},
        }
        found["versions"][called] = next(iter((record.facts.get("versions") or {}).values()), None)
        found["n-shot"][called] = next(iter((record.facts.get("num_fewshot") or {}).values()), 0)
        found["task_hashes"][called] = record.facts.get("documents_sha256")
    environment, versions = first.environment, first.environment.get("versions") or {}
    seconds = sum(record.timings.get("seconds", 0.0) for record in records)
    return {
        **found,
        "config": {
            "model": "kvbench",
            "model_args": f"pretrained={model},kv_cache_dtype={dtype},kv_cache_rotation={rotation}",
            "model_revision": first.model.get("revision"),
            "model_dtype": first.model.get("compute_dtype"),
            "limit": first.limit,
            "random_seed": first.identity.get("seed"),
            "kvbench": {
                "scheme": first.identity["scheme"],
                "scoring": first.scoring,
                "bits_per_value": first.bits_per_value,
                "kv_bytes_per_token": first.kv_bytes_per_token,
                "source_sha256": environment.get("source_sha256"),
                "cells": {scheme.labels[record.cell]: record.cell for record in records},
            },
        },
        "git_hash": (environment.get("git") or {}).get("revision"),
        "date": datetime.fromisoformat(first.finished).timestamp(),
        "transformers_version": versions.get("transformers"),
        "lm_eval_version": first.facts.get("lm_eval"),
        "model_source": "kvbench",
        "model_name": " · ".join(scheme.names),
        "model_name_sanitized": name,
        "total_evaluation_time_seconds": str(seconds),
    }


def _called(task: str, record: Record, called: str) -> str:
    """A task of a cell, with the options that tell this cell from another of its task: `gsm8k (num_fewshot=5)`."""
    return f"{task}{called.removeprefix(record.task)}"


def _samples(store: Store, record: Record, called: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The samples of a cell's tasks, a line a document and filter."""
    known = {"task", "doc_id", "doc_hash", "prompt_hash", "target_hash", "filter", "resps", "filtered_resps"}
    known |= {"logprobs", "greedy", "cluster"}
    tasks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in json.loads(store.samples(record.cell).to_json(orient="records")):
        single = record.task if row.get("task") == record.identity["task"]["task"] else row.get("task")
        answers = row.get("resps")
        if answers is None:
            pairs = zip(row.get("logprobs") or [], row.get("greedy") or repeat(None), strict=False)
            answers = [[str(logprob), str(greedy)] for logprob, greedy in pairs]
        metrics = {name: value for name, value in row.items() if name not in known and "." not in name}
        tasks[_called(single or record.task, record, called)].append(
            {
                "doc_id": row["doc_id"],
                "doc": {},
                "target": "",
                "arguments": {},
                "resps": [[answer] for answer in answers],
                "filtered_resps": row.get("filtered_resps") or answers,
                "filter": row["filter"],
                "metrics": list(metrics),
                **{name: row.get(name) or "" for name in ("doc_hash", "prompt_hash", "target_hash")},
                **metrics,
            }
        )
    yield from tasks.items()
