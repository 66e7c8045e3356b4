"""What the host does of a task's work: microseconds a request, with a model whose passes take no time.

The passes are those of a GPU (65,536 tokens, 256 sequences decoded at once), over requests of the shapes of stock tasks
with random tokens. What the model, its head and its cache compute is left out: hidden states and logits are zeros. What
is left is what a GPU waits for, or not: prefix trees, pages, slots, positions, rows of log-probabilities, answers.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvbench.environment import describe
from kvbench.runners import catalog
from kvbench.runners.base import GenerateRequest, ModelInfo, ScoreRequest, ScoreRequests
from kvbench.runners.load import load
from kvbench.runners.transformers import TransformersModel
from kvbench.runners.transformers.forward import Forward
from kvbench.runners.transformers.memory import GPU_LIMITS, Limits
from kvbench.schemes import Scheme

VOCABULARY = 64  # the tokenizer's last one below is a letter
REPEATS = 5


def tokens(draw: random.Random, fewest: int, most: int) -> tuple[int, ...]:
    """Random tokens."""
    return tuple(draw.randrange(20, VOCABULARY) for _ in range(draw.randint(fewest, most)))


def choices(questions: int, shots: int, fewest: int, most: int, answers: int) -> list[ScoreRequest]:
    """Multiple choice: each question, after common shots, with each of its answers."""
    draw = random.Random(0)
    common = tokens(draw, shots, shots)
    found = []
    for _ in range(questions):
        context = common + tokens(draw, fewest, most)
        found += [ScoreRequest(context, tokens(draw, 1, 8)) for _ in range(answers)]
    return found


def answers(prompts: int, shots: int, new: int, stop: tuple[str, ...]) -> list[GenerateRequest]:
    """Answers to few-shot questions."""
    draw = random.Random(0)
    common = tokens(draw, shots, shots)
    return [GenerateRequest(common + tokens(draw, 40, 120), new, stop) for _ in range(prompts)]


WORK: dict[str, Callable[[], Sequence[Any]]] = {
    "ARC-Easy, 0 shots": lambda: choices(2376, 0, 15, 45, 4),
    "PIQA, 0 shots": lambda: choices(1838, 0, 8, 30, 2),
    "LAMBADA": lambda: choices(5153, 0, 60, 110, 1),
    "ARC-Easy, 25 shots": lambda: choices(1000, 900, 15, 45, 4),
    "GSM8K, 5 shots": lambda: answers(256, 800, 64, ("Question:", "</s>", "<|im_end|>")),
}


class Idle:
    """A model's forward that computes nothing, and what was asked of it."""

    def __init__(self) -> None:
        self.passes = 0

    def hidden(self, tokens: torch.Tensor, *_: Any) -> torch.Tensor:
        """Zeros [T, 1]."""
        self.passes += 1
        return torch.zeros(len(tokens), 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same logits [n, VOCABULARY] in every row."""
        return torch.arange(VOCABULARY, dtype=torch.float32).expand(len(hidden), -1)


def runner(idle: Idle) -> Any:
    """A runner of a model of one narrow layer that computes nothing, with a real tokenizer."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    info = ModelInfo("idle", "none", "float32", ((1, 16),), 4096)
    tokenizer = load(catalog.resolve("smollm2-135m-instruct"), "float32", "cpu")[1]
    made = TransformersModel(LlamaForCausalLM(config).eval(), tokenizer, info).runner(Scheme.parse("int8"))
    # as on a GPU, but for the memory, of which a CPU does not say what is free
    made.memory.limits = Limits(GPU_LIMITS.tokens, GPU_LIMITS.sequences, GPU_LIMITS.logits, 0.0)
    return made


def measured(requests: Sequence[Any]) -> dict[str, float]:
    """Seconds of the host's work on these requests, of a task's first cell and the median of later ones; and passes."""
    idle, seconds = Idle(), []
    made = runner(idle)
    scored = isinstance(requests[0], ScoreRequest)
    asked: Any = ScoreRequests.of(requests) if scored else requests
    with mock.patch.multiple(
        Forward,
        hidden=lambda _, *given: idle.hidden(*given),
        logits=lambda _, hidden: idle.logits(hidden),
        log_probs=lambda _, hidden: idle.logits(hidden),
    ):
        for _ in range(1 + REPEATS):
            idle.passes = 0
            begin = time.process_time()
            made.score(asked) if scored else made.generate(asked)
            seconds.append(time.process_time() - begin)
    row = {"requests": len(requests), "passes": idle.passes, "first_seconds": seconds[0]}
    return {**row, "seconds": median(seconds[1:])}


def main() -> None:
    """Prints a row a task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = describe()
    print(f"{facts['cpu']}, one thread, median of {REPEATS}")
    rows = []
    for name, make in WORK.items():
        rows.append({"work": name, **measured(make())})
        row: Any = rows[-1]
        each = 1e6 * row["seconds"] / row["requests"]
        print(
            f"{name:<20} {row['requests']:5} requests {row['passes']:4} passes {1e3 * row['seconds']:7.0f} ms "
            f"{each:6.1f} µs a request, at first {1e3 * row['first_seconds']:.0f} ms",
            flush=True,
        )
    if options.output:
        environment = {**facts, "command": "benchmarks/host.py"}
        options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
