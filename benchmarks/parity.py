"""How far kvbench with the exact cache is from lm-eval's own HFLM, task by task, on the same weights in float32.

The data is the offline mirror's (`--data`, or KVBENCH_DATA).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from lm_eval.models.huggingface import HFLM

from kvbench.runners import models
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.tasks import RunContext, make_task

TASKS: tuple[dict[str, Any], ...] = (
    {"task": "arc_easy"},
    {"task": "piqa"},
    {"task": "lambada_openai"},
    {"task": "wikitext", "limit": 2},
    {"task": "gsm8k", "num_fewshot": 5, "limit": 6},
)


def main() -> None:
    """Runs each task both ways, and prints the largest differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("KVBENCH_DATA"), help="the offline mirror's folder")
    parser.add_argument("--documents", type=int, default=36, help="of the tasks with short documents")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    options = parser.parse_args()
    if options.data is None:
        sys.exit("error: no data: name the offline mirror's folder with --data or KVBENCH_DATA")
    logging.disable(logging.WARNING)

    loaded = TransformersModel.load(models.resolve(options.model), "float32")
    runner = loaded.runner(Scheme.parse("auto"))
    context = RunContext(lambda *_: {}, lambda *_: None)
    hflm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=8, device="cpu")
    hflm.truncated = 0  # what our own model class counts
    print(f"{'task':<16} documents  largest |Δ log-likelihood|  equal texts  largest |Δ metric|  kvbench s  HFLM s")
    for spec in TASKS:
        task = make_task({"limit": options.documents, **spec}, options.data)
        start = time.perf_counter()
        ours = task.run(runner, context)
        middle = time.perf_counter()
        with mock.patch("kvbench.tasks.runner_lm.RunnerLM", return_value=hflm):
            theirs = task.run(runner, context)
        end = time.perf_counter()
        pairs = list(zip(ours.samples, theirs.samples, strict=True))
        apart = [
            abs(x - y) for a, b in pairs for x, y in zip(a.get("logprobs", []), b.get("logprobs", []), strict=True)
        ]
        texts = [a["resps"] == b["resps"] for a, b in pairs if "resps" in a]
        metric = max(abs(a.value - b.value) for a, b in zip(ours.metrics, theirs.metrics, strict=True))
        log_likelihood = f"{max(apart):.1e}" if apart else "-"
        equal = f"{sum(texts)}/{len(texts)}" if texts else "-"
        print(
            f"{task.name:<16} {ours.facts['documents']:>9}  {log_likelihood:>26}  {equal:>11}  {metric:>18.1e}  "
            f"{middle - start:>9.1f}  {end - middle:>6.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
