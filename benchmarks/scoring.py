"""Seconds on this machine: ARC-Easy under the fp16 cache against lm-eval's HFLM, and 5 shots without prefix reuse.

Both get the same token requests, the same loaded model, dtype and threads. HFLM runs at several batch sizes and its
best counts. The 5-shot prompts are gsm8k_cot's, answered by a few tokens, so that the prompts' share shows. The data is
the offline mirror's (`--data`, or KVBENCH_DATA).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lm_eval.models.huggingface import HFLM

from kvbench.environment import describe
from kvbench.runners import catalog
from kvbench.runners.transformers import TransformersModel, TransformersRunner, passes
from kvbench.runners.transformers.prefix import build_tree
from kvbench.schemes import Scheme
from kvbench.tasks import RunContext, make_task

HFLM_BATCH_SIZES = (1, 8, 32)


ANSWER_TOKENS = 8


class Recorded(Exception):
    """Carries a task's requests out of it, before the model runs."""

    def __init__(self, requests: Sequence[Any]) -> None:
        super().__init__()
        self.requests = list(requests)


def requests_of(spec: dict[str, Any], data: Path, runner: TransformersRunner) -> list[Any]:
    """The token requests that a task makes."""

    def record(requests: Sequence[Any], *_: Any) -> list[Any]:
        raise Recorded(requests)

    with mock.patch.multiple(runner, score=record, generate=record):
        try:
            make_task(spec, data).run(runner, RunContext(lambda *_: {}, lambda *_: None))
        except Recorded as recorded:
            return recorded.requests
    raise AssertionError("the task asked the model nothing")


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and what it gives."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def main() -> None:
    """Times both, and prints them side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("KVBENCH_DATA"), help="the offline mirror's folder")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--fewshot-documents", type=int, default=16)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    options = parser.parse_args()
    if options.data is None:
        sys.exit("error: no data: name the offline mirror's folder with --data or KVBENCH_DATA")
    logging.disable(logging.WARNING)

    loaded = TransformersModel.load(catalog.resolve(options.model), "float32")
    runner = loaded.runner(Scheme.parse("fp16"))
    facts = describe()
    print(f"{options.model}, float32, {torch.get_num_threads()} threads, {facts['cpu']}")

    requests = requests_of({"task": "arc_easy", "limit": options.documents}, options.data, runner)
    tokens = sum(len(r.context) + len(r.continuation) for r in requests)
    print(f"arc_easy 0-shot, {options.documents} documents, {len(requests)} requests of {tokens} tokens in all")
    runner.score(requests[:8])  # warm
    ours, scores = seconds(lambda: runner.score(requests))
    print(f"  kvbench fp16 cache     {ours:7.2f} s")
    plain = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1, device="cpu")
    as_hflm = [(("", ""), list(r.context), list(r.continuation)) for r in requests]
    best = float("inf")
    for batch_size in HFLM_BATCH_SIZES:
        plain.batch_size_per_gpu = batch_size
        theirs, answers = seconds(lambda: plain._loglikelihood_tokens(as_hflm, disable_tqdm=True))
        best = min(best, theirs)
        print(f"  HFLM, batch {batch_size:<3}        {theirs:7.2f} s")
    apart = max(abs(float(s.logprobs.sum()) - logprob) for s, (logprob, _) in zip(scores, answers, strict=True))
    print(f"  HFLM's best / kvbench  {best / ours:7.2f}    largest |Δ log-likelihood| {apart:.1e} (fp16 cache or none)")

    shots = requests_of(
        {"task": "gsm8k_cot", "num_fewshot": 5, "limit": options.fewshot_documents}, options.data, runner
    )
    prompts = [replace(request, max_new_tokens=ANSWER_TOKENS) for request in shots]
    tokens = sum(len(request.prompt) for request in prompts)
    print(f"gsm8k_cot 5-shot, {len(prompts)} prompts of {tokens} tokens in all, {ANSWER_TOKENS} tokens of each answer")
    reused, answers = seconds(lambda: runner.generate(prompts))
    with mock.patch.object(passes, "build_tree", lambda sequences, *_: build_tree(sequences, min_shared=2**40)):
        alone, others = seconds(lambda: runner.generate(prompts))
    equal = sum(a == b for a, b in zip(answers, others, strict=True))
    print(f"  with prefix reuse      {reused:7.2f} s")
    print(f"  without                {alone:7.2f} s    {equal} of {len(prompts)} answers equal")
    print(f"  gain                   {alone / reused:7.2f}")


if __name__ == "__main__":
    main()
