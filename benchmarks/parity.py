"""How far kvbench with the exact cache is from lm-eval's own HFLM on the same weights, and both from float64.

Largest differences of a request's log-likelihood, and how many documents' answers flip. "HFLM again" is HFLM against
itself in batches of another size: the noise of its arithmetic, which nothing can be nearer to it than. The data is the
offline mirror's (`--data`, or KVBENCH_DATA).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from lm_eval.models.huggingface import HFLM

from kvbench.environment import describe
from kvbench.runners import catalog
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.tasks import RunContext, make_task

TASKS: tuple[dict[str, Any], ...] = (
    {"task": "arc_easy"},
    {"task": "piqa"},
    {"task": "lambada_openai"},
    {"task": "wikitext"},
    {"task": "gsm8k", "num_fewshot": 5},
)


def apart(ours: Any, theirs: Any) -> dict[str, Any]:
    """The largest differences of a log-likelihood and of a metric, flipped answers, and how many texts are equal."""
    pairs = list(zip(ours.samples, theirs.samples, strict=True))
    found: dict[str, Any] = {
        "metric": max(abs(a.value - b.value) for a, b in zip(ours.metrics, theirs.metrics, strict=True))
    }
    if "logprobs" in ours.samples[0]:
        found["largest"] = max(abs(x - y) for a, b in pairs for x, y in zip(a["logprobs"], b["logprobs"], strict=True))
    if "acc" in ours.samples[0]:
        found["flips"] = sum(a["acc"] != b["acc"] for a, b in pairs)
    if "resps" in ours.samples[0]:
        found["equal_texts"] = sum(a["resps"] == b["resps"] for a, b in pairs)
    return found


def cell(found: dict[str, Any]) -> str:
    """A comparison as the table shows it."""
    parts = [f"{found['largest']:.1e}"] if "largest" in found else []
    parts += [f"{found['flips']} flips"] if "flips" in found else []
    parts += [f"{found['equal_texts']} equal"] if "equal_texts" in found else []
    return ", ".join(parts)


def main() -> None:
    """Runs each task on all sides, and prints how far they are apart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("KVBENCH_DATA"), help="the offline mirror's folder")
    parser.add_argument("--documents", type=int, default=36, help="of the tasks with short documents")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="cpu")
    names = [str(spec["task"]) for spec in TASKS]
    parser.add_argument("--task", action="append", choices=names, help="all five when not given; repeatable")
    parser.add_argument("--answers", type=int, default=6, help="documents of gsm8k")
    parser.add_argument("--chat", action="store_true", help="ask ARC-Easy and GSM8K in the model's chat template too")
    parser.add_argument(
        "--brief", action="store_true", help="neither HFLM again nor float64, which take time and memory"
    )
    parser.add_argument("--dtype", action="append", help="compute dtype; repeatable; float32 when not given")
    parser.add_argument("--batch-size", type=int, default=8, help="HFLM's; its second run takes three quarters of it")
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    options = parser.parse_args()
    if options.data is None:
        sys.exit("error: no data: name the offline mirror's folder with --data or KVBENCH_DATA")
    logging.disable(logging.WARNING)

    limits = {"gsm8k": options.answers, "wikitext": 2}
    specs = [{"limit": limits.get(str(spec["task"]), options.documents), **spec} for spec in TASKS]
    specs = [spec for spec in specs if spec["task"] in (options.task or names)]
    if options.chat:
        specs += [{**spec, "apply_chat_template": True} for spec in specs if spec["task"] in ("arc_easy", "gsm8k")]
    tasks = [make_task(spec, options.data) for spec in specs]
    source = catalog.resolve(options.model)
    context = RunContext(lambda *_: {}, lambda *_: None)

    environment = describe()  # before anything of the source can change

    def run(dtype: str, *batch_sizes: int) -> list[list[Any]]:
        """Each task's outcomes: kvbench's, and HFLM's with each batch size."""
        made = "float32" if dtype == "float64" else dtype
        loaded = TransformersModel.load(source, made, options.device)  # type: ignore[arg-type]
        if dtype == "float64":
            loaded.model.double()
        runner = loaded.runner(Scheme.parse("auto"))
        outcomes = [[task.run(runner, context)] for task in tasks]
        loaded.model.set_attn_implementation("sdpa")
        for batch_size in batch_sizes:
            hflm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
            hflm.truncated = 0  # what our own model class counts
            with mock.patch("kvbench.tasks.runner_lm.RunnerLM", return_value=hflm):
                for task, found in zip(tasks, outcomes, strict=True):
                    found.append(task.run(runner, context))
        return outcomes

    columns = {"kvbench - HFLM": (0, 1)}
    batch_sizes = [options.batch_size]
    exact: list[Any] = [None] * len(tasks)
    if not options.brief:
        exact = [outcomes[0] for outcomes in run("float64")]
        columns |= {"HFLM again": (1, 2), "kvbench - float64": (0, -1), "HFLM - float64": (1, -1)}
        batch_sizes.append(max(1, options.batch_size * 3 // 4))
    print(f"{'dtype':<9} {'task':<15} {'documents':>9}  {'  '.join(f'{name:>20}' for name in columns)}")
    rows = []
    for dtype in options.dtype or ["float32"]:
        outcomes = run(dtype, *batch_sizes)
        for task, reference, found in zip(tasks, exact, outcomes, strict=True):
            sides = found if reference is None else [*found, reference]
            row = {name: apart(sides[a], sides[b]) for name, (a, b) in columns.items()}
            documents = found[0].facts["documents"]
            rows.append({"dtype": dtype, "task": task.name, "documents": documents, **row})
            cells = "  ".join(f"{cell(each):>20}" for each in row.values())
            print(f"{dtype:<9} {task.name:<15} {documents:>9}  {cells}", flush=True)
    if options.output:
        asked = {name: value for name, value in vars(options).items() if name not in ("data", "output")}
        environment |= {"command": f"benchmarks/parity.py {asked}"}
        options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
