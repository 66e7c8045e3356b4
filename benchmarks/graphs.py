"""Why a repeated speed differs: the decode steps of runner after runner, each with CUDA graphs of its own.

The runners are equal: a shape's random weights in 16 bits. Of each come milliseconds a step, twice, and from a profile
of a third run the launches of its last steps, the gaps between them and how long its kernels take. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kvbench.environment import describe
from kvbench.runners import catalog
from kvbench.runners.base import GenerateRequest
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.sweep.session import clear_garbage
from kvbench.timing.spans import spans

PROMPT, BATCH, NEW = 64, 8, 81
SHAPE = Path(__file__).parents[1] / "configs" / "shapes" / "qwen3-8b.json"


def requests(vocabulary: int, new: int, seed: str) -> list[GenerateRequest]:
    """A batch of prompts of random tokens."""
    draw = random.Random(seed)
    return [GenerateRequest(tuple(draw.randrange(vocabulary) for _ in range(PROMPT)), new) for _ in range(BATCH)]


def step(runner: Any, asked: list[GenerateRequest]) -> float:
    """Milliseconds a decode step."""
    before = runner.stats().get("decode_seconds", 0.0)
    runner.generate(asked)
    return 1e3 * float(runner.stats()["decode_seconds"] - before) / (asked[0].max_new_tokens - 1)


def profiled(runner: Any, asked: list[GenerateRequest], seconds: float) -> dict[str, Any]:
    """What the GPU does in the last so many seconds of a run, in seconds and microseconds."""
    found = spans(lambda: runner.generate(asked))
    found = [span for span in found if span.begin > found[-1].begin - 1e6 * seconds]
    gaps = sorted((max(0.0, after.begin - before.end) for before, after in pairwise(found)), reverse=True)
    kernels, counts = Counter[str](), Counter[str]()
    for span in found:
        kernels[span.name[:60]] += span.end - span.begin
        counts[span.name[:60]] += 1
    return {
        "launches": len(found),
        "span": (found[-1].end - found[0].begin) / 1e6,
        "gap_sum": sum(gaps) / 1e6,
        "largest_gaps_us": [round(gap, 1) for gap in gaps[:40]],
        "median_gap_us": median(gaps),
        "kernels": [(round(us / counts[name], 3), counts[name], name) for name, us in kernels.most_common(14)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHAPE))
    parser.add_argument("--runners", type=int, default=4)
    parser.add_argument("--output", type=Path, help="a JSON record")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("not run: there is no GPU here to time on")
        return
    loaded = TransformersModel.load(catalog.resolve(options.model), "bfloat16", "cuda")
    vocabulary, rows = len(loaded.tokenizer), []
    for turn in range(options.runners):
        clear_garbage()
        torch.cuda.empty_cache()
        runner = loaded.runner(Scheme.parse("fp16"), page_size=64)
        step(runner, requests(vocabulary, 18, "before"))  # compiles and captures
        steps = [step(runner, requests(vocabulary, NEW, str(repeat))) for repeat in range(2)]
        own = profiled(runner, requests(vocabulary, 34, "profiled"), 30 * min(steps) / 1e3)
        rows.append({"turn": turn, "steps": steps, **own})
        print(
            f"runner {turn}: {steps[0]:.2f} and {steps[1]:.2f} ms a step, {own['median_gap_us']:.2f} µs between kernels"
        )
        if options.output:  # of what is stopped, what was done is kept
            options.output.write_text(json.dumps({"environment": describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
