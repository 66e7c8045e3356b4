"""GSM8K's scores, seconds and answers: lm-eval's HFLM beside kvbench's fp16 and int8 cells, one model, one run.

HFLM answers twice, in batches of another size, and so does the fp16 cell (as a sweep's A/A cell, and just as before):
what differs between two runs of the same thing is its noise. Every side but HFLM runs once before it is timed, and
compiles there. Of answers that differ between HFLM and fp16 it is said where they part, and how far apart the logits of
the two tokens are after the common ones, in this dtype by both and in float32 with the same weights: a gap of a step of
the dtype's numbers is rounding, and a larger one in float32 would be an error. The data is the offline mirror's
(`--data`, or KVBENCH_DATA).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from engine import timed
from lm_eval.models.huggingface import HFLM

from kvbench.environment import describe
from kvbench.runners import catalog
from kvbench.runners.base import GenerateRequest, Generation, Progress
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.sweep.again import Around, Shuffled
from kvbench.sweep.session import clear_garbage
from kvbench.tasks import RunContext, make_task
from kvbench.tasks.runner_lm import RunnerLM

Tokens = tuple[int, ...]
BFLOAT16_BITS = 8  # of a mantissa, the leading one included


@dataclass
class Listening(Around):
    """A runner whose answers' tokens are kept by prompt."""

    made: dict[Tokens, Tokens] = field(default_factory=dict)

    def generate(self, requests: Sequence[GenerateRequest], progress: Progress | None = None) -> list[Generation]:
        """As the runner's."""
        answers = self.runner.generate(requests, progress)
        self.made |= {request.prompt: answer.tokens for request, answer in zip(requests, answers, strict=True)}
        return answers


class ListeningHFLM(HFLM):
    """HFLM, whose answers' tokens are kept by prompt; those after an answer's end too."""

    truncated = 0  # what our own model class counts

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.made: dict[Tokens, Tokens] = {}

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        made = super()._model_generate(context, max_length, stop, **options)
        for row, mask, whole in zip(context, options["attention_mask"], made, strict=True):
            self.made[tuple(row[mask.bool()].tolist())] = tuple(whole[len(row) :].tolist())
        return made


@dataclass(frozen=True)
class Side:
    """What one side gave: seconds of all and of the model, scores, texts by document and filter, tokens by prompt."""

    seconds: float
    model_seconds: float
    metrics: dict[str, float]
    rows: dict[tuple[int, str], dict[str, Any]]
    made: dict[Tokens, Tokens]

    def text(self, document: int) -> str:
        """The answer to a document, as it was before filters."""
        return next(str(row["resps"]) for (number, _), row in self.rows.items() if number == document)


def run(task: Any, runner: Any, hflm: ListeningHFLM | None = None) -> Side:
    """One run of the task, by a runner or by HFLM in its place."""
    clear_garbage()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    listening = Listening(runner)
    model = mock.patch("kvbench.tasks.runner_lm.RunnerLM", return_value=hflm) if hflm else mock.MagicMock()
    with model, timed(ListeningHFLM if hflm else RunnerLM) as spent:
        begin = time.perf_counter()
        outcome = task.run(listening, RunContext(lambda *_: {}, lambda *_: None))
        seconds = time.perf_counter() - begin
    metrics = {metric.name: metric.value for metric in outcome.metrics}
    rows = {(row["doc_id"], row["filter"]): row for row in outcome.samples}
    return Side(seconds, sum(spent), metrics, rows, hflm.made if hflm else listening.made)


def apart(a: Side, b: Side) -> dict[str, Any]:
    """How many answers' texts differ, and how many became wrong or right, by metric."""
    documents = sorted({number for number, _ in a.rows})
    flips = {}
    for name in a.metrics:
        metric, _, chosen = name.partition(",")
        pairs = [(row[metric], b.rows[key][metric]) for key, row in a.rows.items() if key[1] == chosen]
        flips[name] = {"lost": sum(x > y for x, y in pairs), "won": sum(x < y for x, y in pairs)}
    return {"texts": sum(a.text(number) != b.text(number) for number in documents), "flips": flips}


def partings(ours: Side, theirs: Side, ends: set[int]) -> list[tuple[Tokens, Tokens, int | None, int]]:
    """(prompt, common tokens, our next token or None for an end, theirs) of each pair of answers that differ."""
    found = []
    for prompt, tokens in ours.made.items():
        others = theirs.made[prompt]
        common = next((i for i, (x, y) in enumerate(zip(tokens, others, strict=False)) if x != y), len(tokens))
        if common == len(
            tokens
        ):  # ours ended here: by an end token, which is not in its tokens, or by what ended theirs
            if common == len(others) or others[common] in ends:
                continue
            found.append((prompt, tokens, None, others[common]))
        else:
            found.append((prompt, tokens[:common], tokens[common], others[common]))
    return found


@torch.inference_mode()
def plain_logits(model: Any, tokens: Tokens) -> torch.Tensor:
    """[V] float32 after these tokens, by the model as transformers runs it, alone and without padding."""
    made: torch.Tensor = model(input_ids=torch.tensor([tokens], device=model.device), logits_to_keep=1).logits[0, -1]
    return made.float()


def gap(logits: torch.Tensor, ours: int | None, theirs: int, ends: set[int]) -> float:
    """The logit of our token less that of theirs."""
    mine = max(float(logits[end]) for end in ends) if ours is None else float(logits[ours])
    return mine - float(logits[theirs])


def explain(
    loaded: TransformersModel, ours: Side, theirs: Side, differing: set[Tokens], ends: set[int]
) -> list[dict[str, Any]]:
    """A row a pair of answers whose texts differ: where they part, and the gap of the two tokens' logits there."""
    parted = [one for one in partings(ours, theirs, ends) if one[0] in differing]
    runner = loaded.runner(Scheme.parse("fp16"))
    rows = []
    for prompt, common, mine, other in parted:
        hidden = runner.hidden_states([prompt + common])[0][-1:]
        plain = plain_logits(loaded.model, prompt + common)
        top = float(plain.max())
        rows.append(
            {
                "prompt_tokens": len(prompt),
                "common_tokens": len(common),
                "tokens": [mine, other],
                "gap_kvbench": gap(runner.log_probs(hidden)[0], mine, other, ends),
                "gap_plain": gap(plain, mine, other, ends),
                "bfloat16_step": 2.0 ** (math.floor(math.log2(abs(top))) + 1 - BFLOAT16_BITS),
            }
        )
    del runner
    loaded.model.float()  # the same weights, exactly
    for row, (prompt, common, mine, other) in zip(rows, parted, strict=True):
        row["gap_float32"] = gap(plain_logits(loaded.model, prompt + common), mine, other, ends)
    return rows


def main() -> None:
    """Runs all sides, and prints them side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("KVBENCH_DATA"), help="the offline mirror's folder")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--documents", type=int, default=256 if torch.cuda.is_available() else 2)
    parser.add_argument("--num-fewshot", type=int, default=5)
    parser.add_argument("--chat", action="store_true", help="ask in the model's chat template")
    parser.add_argument("--batch-size", type=int, default=128, help="HFLM's; its second run takes three quarters of it")
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    options = parser.parse_args()
    if options.data is None:
        sys.exit("error: no data: name the offline mirror's folder with --data or KVBENCH_DATA")
    logging.disable(logging.WARNING)
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    loaded = TransformersModel.load(catalog.resolve(options.model), dtype, device)  # type: ignore[arg-type]
    spec = {"task": "gsm8k", "num_fewshot": options.num_fewshot, "limit": options.documents}
    task = make_task({**spec, "apply_chat_template": options.chat}, options.data)

    environment = describe()  # before anything of the source can change

    def hflm(batch_size: int) -> Side:
        loaded.model.set_attn_implementation("sdpa")
        made = ListeningHFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, device=device)
        return run(task, loaded.runner(Scheme.parse("auto")), made)

    sides = {"HFLM": hflm(options.batch_size), "HFLM again": hflm(max(1, options.batch_size * 3 // 4))}
    for name in ("fp16", "int8"):
        runner = loaded.runner(Scheme.parse(name))
        sides[f"{name} first"] = run(task, runner)
        sides[name] = run(task, runner)
        if name == "fp16":
            sides["fp16 A/A"] = run(task, Shuffled(runner, 1))
        del runner
    pairs = [("HFLM", "HFLM again"), ("HFLM", "fp16"), ("fp16", "fp16 A/A"), ("fp16", "fp16 first"), ("fp16", "int8")]
    found = {f"{a} - {b}": apart(sides[a], sides[b]) for a, b in pairs}

    documents = sorted({number for number, _ in sides["fp16"].rows})
    prompts = dict(zip(documents, sides["fp16"].made, strict=True))
    ours, theirs = sides["fp16"], sides["HFLM"]
    differing = {prompts[number] for number in documents if ours.text(number) != theirs.text(number)}
    settings = loaded.model.generation_config.eos_token_id
    ends = {loaded.tokenizer.eos_token_id, *(settings if isinstance(settings, list) else [settings])} - {None}
    loaded.model.set_attn_implementation("sdpa")
    rows = explain(loaded, ours, theirs, differing, ends)

    names = list(ours.metrics)
    form = "chat" if options.chat else "plain"
    print(
        f"{options.model}, {dtype} on {device}, gsm8k {form}, {options.num_fewshot} shots, {len(documents)} documents"
    )
    print(f"{'':<12} {'seconds':>8} {'model':>8} {'x HFLM':>7}  " + "  ".join(f"{name:>28}" for name in names))
    for name, side in sides.items():
        scores = "  ".join(f"{side.metrics[metric]:>28.4f}" for metric in names)
        ratio = theirs.seconds / side.seconds
        print(f"{name:<12} {side.seconds:>8.2f} {side.model_seconds:>8.2f} {ratio:>7.2f}  {scores}")
    for name, pair in found.items():
        flips = "; ".join(f"{metric} -{flip['lost']} +{flip['won']}" for metric, flip in pair["flips"].items())
        print(f"{name:<20} {pair['texts']:>4} texts differ   {flips}")
    gaps = {}
    for name in ("gap_kvbench", "gap_plain", "gap_float32"):
        sizes = [abs(row[name]) for row in rows]
        near = sum(abs(row[name]) <= 2 * row["bfloat16_step"] for row in rows)
        gaps[name] = {"median": median(sizes), "largest": max(sizes), "within_2_bfloat16_steps": near} if rows else {}
        if rows:
            print(f"{name:<12} where they part: median {median(sizes):.3f}, largest {max(sizes):.3f}, ", end="")
            print(f"{near} of {len(rows)} within 2 steps of bfloat16")
    if rows:
        print(f"common tokens: median {median(row['common_tokens'] for row in rows):.0f}")
    if options.output:
        asked = {name: value for name, value in vars(options).items() if name not in ("data", "output")}
        content = {
            "environment": {**environment, "command": f"benchmarks/answers.py {asked}"},
            "settings": {**asked, "device": device, "dtype": dtype},
            "sides": {
                name: {
                    "seconds": side.seconds,
                    "model_seconds": side.model_seconds,
                    "times_hflm": theirs.seconds / side.seconds,
                    "metrics": side.metrics,
                }
                for name, side in sides.items()
            },
            "apart": found,
            "gaps": gaps,
            "partings": rows,
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
