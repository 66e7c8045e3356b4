"""How far vLLM's cells are from kvbench's own in a run folder that has both: `python benchmarks/in_vllm.py DIR`.

A row a scheme and task: log-likelihoods and answers by document, and the metrics of both. Writes DIR/agreement.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from kvbench.results import Record, Store

SUFFIX = " (vllm)"


def row(store: Store, own: Record, other: Record) -> dict[str, Any]:
    """What two cells of the same scheme and task gave."""
    samples = [store.samples(one.cell).to_dict("records") for one in (own, other)]
    assert [one["prompt_hash"] for one in samples[0]] == [one["prompt_hash"] for one in samples[1]], "other prompts"
    found: dict[str, Any] = {"dtype": own.dtype, "rotation": own.rotation, "task": own.task, "n": len(samples[0])}
    for name in ("logprobs", "ppl"):
        if name in samples[0][0]:
            a, b = (
                np.concatenate([np.log(np.atleast_1d(x[name])) if name == "ppl" else x[name] for x in one])
                for one in samples
            )
            what = "nats a token of a document" if name == "ppl" else "nats a continuation"
            found[f"{what}, largest difference"] = float(np.abs(a - b).max())
            found[f"{what}, mean difference"] = float(np.abs(a - b).mean())
    for name in ("greedy", "resps", "acc"):
        if name in samples[0][0]:
            found[f"{name}, equal"] = sum(np.array_equal(a[name], b[name]) for a, b in zip(*samples, strict=True))
    metrics = [{metric.name: metric for metric in one.metrics} for one in (own, other)]
    for name, metric in metrics[0].items():
        if metric.headline:
            found[name] = [[one[name].value, one[name].stderr] for one in metrics]
    for name in ("top_probability", "top_known"):
        if name in other.facts:
            found[name] = [own.facts[name], other.facts[name]]
    return found


def main() -> None:
    """Prints the rows, and keeps them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    store = Store(folder)
    records = [record for record in store.load().records.values() if record.status == "done"]
    cells = {(one.model["name"], one.dtype, one.rotation, one.task): one for one in records}
    rows = [
        row(store, own, other)
        for (model, *rest), own in cells.items()
        if not own.again and (other := cells.get((model + SUFFIX, *rest))) is not None
    ]
    text = "[\n " + ",\n ".join(json.dumps(row) for row in rows) + "\n]"
    (folder / "agreement.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
