"""A row of the kernel command as a record like the sweep's, so that a report can put speed beside accuracy."""

from __future__ import annotations

from typing import Any

import torch

from kvbench.results import Metric, Record, kernel_task, name_of
from kvbench.schemes import Scheme

IDENTITY_VERSION = 1  # raised when the same row comes to mean another number
PLACE = ("op", "batch", "context", "prefix", "query_heads", "kv_heads", "head_dim", "page_size")


def as_record(row: dict[str, Any], environment: dict[str, Any]) -> tuple[Record, list[dict[str, Any]]]:
    """The record of a row, and its samples: a row a time taken, in microseconds.

    The row itself is the record's `facts`, without its samples. A failed gate makes a failed record.
    environment: of `describe()`, with `device`: the GPU's name is part of the identity.
    """
    gpus = environment.get("gpus") or []
    device = gpus[0]["name"] if environment["device"] != "cpu" and gpus else environment["device"]
    identity = {
        "version": IDENTITY_VERSION,
        "kernel": {name: row[name] for name in PLACE},
        "scheme": {"dtype": row["dtype"], "rotation": row["rotation"]},
        "device": device,
    }
    task = kernel_task(row)
    heads = f"{row['query_heads']}-{row['kv_heads']}x{row['head_dim']}"
    passed = row["gate"] == "ok"
    # queries are bf16, which the interpreter has not
    compute_dtype = "float16" if environment["device"] == "cpu" else "bfloat16"
    scheme = Scheme.parse(row["dtype"], row["rotation"]).resolve(getattr(torch, compute_dtype))
    layer = (row["kv_heads"], row["head_dim"])
    record = Record(
        cell=name_of(f"{task.replace('×', 'x')}-{heads}-{row['dtype']}-{row['rotation']}", identity),
        status="done" if passed else "failed",
        identity=identity,
        model={
            "name": f"{row['query_heads']}/{row['kv_heads']} heads × {row['head_dim']}",
            "revision": None,
            "compute_dtype": compute_dtype,
            "layers": [list(layer)],
        },
        dtype=row["dtype"],
        rotation=row["rotation"],
        task=task,
        scoring="none",
        bits_per_value=scheme.bits_per_value(row["head_dim"]),
        kv_bytes_per_token=scheme.token_bytes([layer]),
        metrics=_metrics(row) if passed else (),
        facts={name: value for name, value in row.items() if name != "samples_us"},
        environment=environment,
        error=None if passed else f"gate {row['gate']}",
    )
    return record, [{"sample": i, "us": us} for i, us in enumerate(row["samples_us"])]


def _metrics(row: dict[str, Any]) -> tuple[Metric, ...]:
    metrics = [Metric("rel_error", row["rel_error"], None, 1, "", False)]
    if row["us"] is not None:
        metrics.insert(0, Metric("us", row["us"], None, len(row["samples_us"]), "µs", False))
    if row["speedup"] is not None:
        metrics.append(Metric("speedup", row["speedup"], None, len(row["samples_us"]), "×", True))
    return tuple(metrics)
