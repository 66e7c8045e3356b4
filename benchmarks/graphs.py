"""What makes the kernels of a CUDA graph start later: single acts of a process, each after another context has worked.

A chain of 500 kernels that do next to nothing and a decode step of a model, both graphs, are timed before and after
each act: a launch on another stream, a copy, memory taken and freed, a graph, another runner. Before each act another
process launches a kernel, so that the GPU changes contexts. Then cells of `throughput` follow one another as in a
sweep, with launches on other streams between them and without, and with a context made and given up before each. Needs
a GPU that nothing else uses; CUDA_DEVICE_MAX_CONNECTIONS is what is to be compared.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kvbench.environment import describe
from kvbench.runners import catalog
from kvbench.runners.base import GenerateRequest
from kvbench.runners.settle import Chain, settle
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.sweep.session import clear_garbage
from kvbench.tasks import RunContext, make_task

CHAIN, ROWS, PROMPT = 500, 8, 64
CONTEXT = RunContext(lambda *_: {}, lambda *_: None)
# launches a kernel for every line it reads
OTHER = """
import sys, torch
x = torch.ones(1024, device="cuda")
for _ in sys.stdin:
    x.mul_(1.0)
    torch.cuda.synchronize()
    print("done", flush=True)
"""

Act = Callable[[], object]


@contextmanager
def other_process() -> Iterator[Act]:
    """What has another process launch a kernel."""
    command = [sys.executable, "-P", "-u", "-c", OTHER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    asked, answers = process.stdin, process.stdout
    assert asked is not None
    assert answers is not None

    def launch() -> None:
        asked.write("\n")
        asked.flush()
        answers.readline()

    try:
        launch()
        yield launch
    finally:
        process.kill()
        process.wait()


def milliseconds(run: Act, times: int) -> float:
    """Of one of so many runs."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / times


def launch_on(streams: list[torch.cuda.Stream], small: torch.Tensor) -> None:
    """A kernel on each."""
    for stream in streams:
        with torch.cuda.stream(stream):
            small.add_(0)


class Bench:
    """A model's runner, the two graphs, and the acts."""

    def __init__(self, model: str) -> None:
        self.loaded = TransformersModel.load(catalog.resolve(model), "bfloat16", "cuda")
        self.draw = random.Random(0)
        self.runner = self.new_runner()
        [batch] = self.runner.memory.graphed.values()
        self.batch: Any = batch
        self.small = torch.zeros(32, device="cuda")
        self.chain = self.captured()

    def new_runner(self) -> Any:
        """One that has decoded, and so has a graph."""
        runner = self.loaded.runner(Scheme.parse("fp16"), page_size=64)
        self.decode(runner, 4)
        return runner

    def decode(self, runner: Any, new: int) -> None:
        """So many tokens of a few prompts."""
        size = len(self.loaded.tokenizer)
        prompts = [tuple(self.draw.randrange(size) for _ in range(PROMPT)) for _ in range(ROWS)]
        runner.generate([GenerateRequest(prompt, new, ignore_eos=True) for prompt in prompts])

    def captured(self) -> Chain:
        """The chain as a graph."""
        return Chain(torch.device("cuda"), CHAIN)

    def step(self) -> None:
        """One decode step; the batch has room for a few steps' tokens alone."""
        self.batch._step.zero_()
        self.batch._graphs[ROWS].replay()

    def state(self) -> dict[str, float]:
        """Microseconds a kernel of the chain, milliseconds a step: medians of three."""
        torch.cuda.synchronize()
        found = [(self.chain.kernel_us(), milliseconds(self.step, 5)) for _ in range(3)]
        chain, step = (median(column) for column in zip(*found, strict=True))
        return {"kernel_us": chain, "step_ms": step}

    def acts(self) -> list[tuple[str, Act]]:
        """What a process does, one thing at a time."""
        held: dict[str, Any] = {}
        there = torch.zeros(2**20, dtype=torch.uint8, device="cuda")
        host = torch.zeros(2**20, dtype=torch.uint8, pin_memory=True)

        def hold(what: str, make: Callable[[], Any]) -> Act:
            return lambda: held.update({what: make()})

        def give_up(*what: str) -> Act:
            return lambda: (
                [held.pop(name, None) for name in what],
                clear_garbage(),
                torch.cuda.empty_cache(),
                torch._C._host_emptyCache(),
            )

        def pinned() -> torch.Tensor:
            return torch.empty(2**26, dtype=torch.uint8, pin_memory=True)

        return [
            ("nothing", lambda: None),
            ("an event", lambda: torch.cuda.Event().record()),
            ("a launch on another stream", lambda: launch_on([torch.cuda.Stream()], self.small)),
            ("launches on eight more", lambda: launch_on([torch.cuda.Stream() for _ in range(8)], self.small)),
            ("a copy to the GPU", lambda: there.copy_(host, non_blocking=True)),
            ("a copy to the host", lambda: host.copy_(there, non_blocking=True)),
            ("a copy to the GPU of pageable memory", lambda: there[:64].copy_(torch.zeros(64, dtype=torch.uint8))),
            ("a number read", lambda: there[0].item()),
            ("4 GiB taken", hold("room", lambda: torch.empty(2**32, dtype=torch.uint8, device="cuda"))),
            ("4 GiB freed", give_up("room")),
            ("memory pinned", hold("pinned", pinned)),
            ("memory unpinned", give_up("pinned")),
            ("a graph captured", hold("graph", self.captured)),
            ("that graph replayed", lambda: held["graph"].replay()),
            ("that graph gone", give_up("graph")),
            ("a product", lambda: torch.mm(*torch.randn(2, 2048, 2048, device="cuda", dtype=torch.bfloat16))),
            ("another runner", hold("runner", self.new_runner)),
            ("that runner again", lambda: self.decode(held["runner"], 20)),
            ("that runner gone", give_up("runner")),
            ("a second of sleep", lambda: time.sleep(1)),
        ]

    def throughput(self, before: Act) -> dict[str, Any]:
        """Milliseconds a step of a cell of that task, each repeat's."""
        clear_garbage()
        runner = self.loaded.runner(Scheme.parse("fp16"), page_size=64)
        task = make_task({"task": "throughput", "prompt": PROMPT, "new": 97, "batch": ROWS, "repeats": 2}, None)
        before()
        found = task.run(runner, CONTEXT)
        return {"steps_ms": [1e3 * row["decode_seconds"] / 96 for row in found.samples]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a JSON record")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("not run: there is no GPU here to time on")
        return
    bench, environment = Bench(options.model), describe()
    rows: list[dict[str, Any]] = []

    def show(**row: Any) -> None:
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if options.output:  # of what is stopped, what was done is kept
            options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")

    show(act="at first", **bench.state())
    with other_process() as launch:
        for name, act in bench.acts() * options.rounds:
            launch()
            before = bench.state()
            act()
            show(act=name, before=before, after=bench.state())

    def elsewhere() -> None:
        launch_on([torch.cuda.Stream() for _ in range(8)], bench.small)

    def changed() -> None:
        elsewhere()
        settle([torch.device("cuda")])

    for name, before_cell in (("as they are", lambda: None), ("launches elsewhere", elsewhere), ("a context", changed)):
        for _ in range(4):
            show(throughput=name, **bench.throughput(before_cell), **bench.state())


if __name__ == "__main__":
    main()
