"""What stands around the numbers of a table: its title, the names of its tasks, and what to know of its cells."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from kvbench.results import Record, name_of

# times the fastest cell's empty kernel: between what one state varies by (1.12 in a sweep of 21 cells, whose repeats
# decode alike within .1 %) and what the other takes (1.25 to 1.4)
SLOWER = 1.2


def task_labels(records: Sequence[Record]) -> dict[str, str]:
    """What the task of each cell is called; tasks of one name and other options get these beside it."""
    identities: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        task = record.identity.get("task", {})
        identities[record.task][name_of("", task)] = task
    labels = {}
    for record in records:
        same_name = list(identities[record.task].values())
        task = record.identity.get("task", {})
        label = record.task
        if len(same_name) > 1:
            keys = [key for key in task if len({json.dumps(one.get(key), sort_keys=True) for one in same_name}) > 1]
            options = [
                f"{key}={task[key]}"
                for key in keys
                if not isinstance(task[key], (dict, list)) and len(str(task[key])) < 24
            ]
            label += f" ({', '.join(options) or name_of('', task).lstrip('-')})"
        labels[record.cell] = label
    return labels


def group_of(record: Record) -> tuple[str, ...]:
    """What the cells of one table have in common."""
    model = record.identity.get("model", {})
    # full runs before quick looks
    limit = f"{record.limit:09}" if record.limit is not None else ""
    seed = str(record.identity.get("seed"))
    return (
        limit,
        record.model["name"],
        str(model.get("revision")),
        str(model.get("compute_dtype")),
        record.scoring,
        seed,
    )


def title_of(record: Record) -> str:
    """What a table of such cells is called."""
    seed = record.identity.get("seed")
    parts = [record.model["name"], str(record.model.get("compute_dtype")), f"scoring {record.scoring}"]
    return " · ".join([*parts, *([f"seed {seed}"] if seed else [])])


def warnings_of(records: Sequence[Record]) -> list[str]:
    """What a reader must know before the numbers."""
    warnings = []
    if any(record.identity.get("model", {}).get("trust_remote_code") for record in records):
        warnings.append("trust_remote_code: Python code that came with the model ran, and had a part in its numbers")
    if records[0].limit is not None:
        warnings.append(f"NOT A REAL SCORE: --limit {records[0].limit}, the first documents of each task alone")
    machines = {machine_of(record) for record in records if record.environment}
    if len(machines) > 1:
        warnings.append(f"cells of {len(machines)} environments: {'; '.join(sorted(machines))}")
    return warnings


def notes_of(records: Sequence[Record]) -> list[str]:
    """What stands below a table: the weights, the machine, and what was cut."""
    notes = [f"model revision {records[0].model.get('revision')}"]
    machines = {machine_of(record) for record in records if record.environment}
    if len(machines) == 1:
        notes.append(machines.pop())
    cut = {
        record.task: limit
        for record in records
        if record.limit is None and isinstance(limit := record.identity.get("task", {}).get("limit"), int)
    }
    generation = next((found for record in records if (found := record.identity.get("generation"))), None)
    if generation:
        settings = ", ".join(f"{name} {json.dumps(value)}" for name, value in generation.items())
        notes.append(f"answers follow the model's generation_config.json: {settings}")
    engines = {
        f"{extra['backend']} {extra.get(extra['backend'])}": str(record.facts.get("attention"))
        for record in records
        if "backend" in (extra := record.model.get("extra") or {})
    }
    notes += [f"run by {engine} on its own cache, read by {attention}" for engine, attention in engines.items()]
    notes += scheme_notes(records)
    limits: dict[str, dict[str, None]] = defaultdict(dict)
    for record in records:
        if limit := record.facts.get("longest_context_limit"):
            limits[limit][record.dtype] = None
    if limits:
        by = "; ".join(f"{limit} ({', '.join(dtypes)})" for limit, dtypes in limits.items())
        notes.append(f"longest context: what the runner takes, limited by {by}")
    paces = {f"{one.dtype} · {one.rotation} · {one.task}": us for one in records if (us := one.facts.get("kernel_us"))}
    fast = min(paces.values(), default=0.0)
    if slow := [f"{us:.2f} ({cell})" for cell, us in paces.items() if us > SLOWER * fast]:
        notes.append(
            f"decode rates of two states of a GPU: an empty kernel of a graph took {fast:.2f} µs, but {', '.join(slow)}"
        )
    if cut:
        notes.append("first documents only: " + ", ".join(f"{task} {limit}" for task, limit in cut.items()))
    return notes


def scheme_notes(records: Sequence[Record]) -> list[str]:
    """What computed the cells where that is not the same for all, and what schemes learned."""
    notes = []
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for record in records:
        if (implementation := record.facts.get("attention")) in ("reference", "triton"):
            cells[implementation][f"{record.dtype} · {record.rotation}"] = record.facts.get("kernels_lack") or ""
    if len(cells) > 1 or any(cells["reference"].values()):
        by = [f"{scheme}{f' ({why})' if why else ''}" for scheme, why in cells["reference"].items()]
        notes.append(f"attention computed by the reference: {'; '.join(by)}; all else by the kernels")
    taught: dict[str, dict[str, None]] = defaultdict(dict)
    seconds: dict[str, float] = {}
    for record in records:
        if learned := record.facts.get("learned"):
            shape = str(record.model.get("revision")).startswith("random-")
            text = "random tokens" if shape else f"{learned['tokens']} tokens of text {learned['text_sha256'][:8]}"
            what = f"keys' means {learned['means']}, from" if "means" in learned else "keys' transforms learned from"
            line = f"{what} {text} (what was learned: {learned['sha256'][:8]}"
            taught[line][f"{record.dtype} · {record.rotation}"] = None
            if "seconds" in learned:
                seconds[line] = learned["seconds"]
    for line, schemes in taught.items():
        took = f", in {seconds[line]:.1f} s" if line in seconds else ""
        notes.append(f"{line}{took}): {', '.join(schemes)}")
    return notes


def machine_of(record: Record) -> str:
    """Processor and versions, in words."""
    environment = record.environment
    gpus = [gpu["name"] for gpu in environment.get("gpus") or []]
    processor = gpus[0] if gpus and environment.get("device") != "cpu" else environment.get("cpu")
    if processor == environment.get("cpu") and environment.get("cores"):
        processor = f"{processor}, {environment['cores']} cores"
    versions = environment.get("versions") or {}
    software = [f"{name} {versions[name]}" for name in ("torch", "transformers", "lm_eval") if versions.get(name)]
    git = environment.get("git") or {}
    revision = f" at {git['revision'][:9]}" if git.get("revision") else ""
    # records before it was kept have none
    source = f", source {environment['source_sha256'][:9]}" if environment.get("source_sha256") else ""
    return ", ".join(
        [str(processor), *software, f"kvbench {environment.get('kvbench') or 'from a checkout'}{revision}{source}"]
    )
