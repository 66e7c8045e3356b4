"""What sealing pages costs a decode step: one layer's append and attention, of steps that seal pages and of others.

    python benchmarks/sealing.py [FILE]     the table; FILE gets the rows as JSON

32 sequences of 8k tokens, 32 query and 8 KV heads of 128 channels, bf16. All sequences fill a page in the same step,
which is the most that a step can have to seal. Kernels seal nothing: each step writes its row packed and in 16 bits, so
theirs are steps with a window beside steps without. Needs a GPU.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvbench.attention import Batch, Implementation, Near, append, attend
from kvbench.cache import PagedCache, PagePool, PageTable, Rings, on_device
from kvbench.environment import describe
from kvbench.schemes import Scheme

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SEQUENCES, PAGE = 32, 64
SAMPLES, REPEATS = 30, 10


@dataclass(frozen=True)
class Case:
    """A scheme, by name, and what computes it over how many tokens a sequence."""

    scheme: str
    rotation: str | None
    impl: Implementation
    tokens: int


CASES = (
    Case("int4", "hadamard", "triton", 8192),
    Case("int4+w64s4", "hadamard", "triton", 8192),
    Case("kivi2", None, "reference", 8192),
    Case("kivi4", None, "reference", 8192),
    Case("kivi2", None, "reference", 1024),
)


def step(case: Case, length: int, device: torch.device) -> Callable[[], None]:
    """One layer's work for the token that makes each sequence so long; its cache has bytes of no meaning before it."""
    scheme = Scheme.parse(case.scheme, case.rotation).resolve(torch.bfloat16)
    window = scheme.window
    # kernels read rows in 16 bits beside the packed ones, the reference from rings
    beside = case.impl == "triton"
    rings = None if window is None or beside else Rings(window.sinks, window.recent, window.page, PAGE)
    shapes = [(KV_HEADS, HEAD_DIM)]
    pages = SEQUENCES * (length // PAGE + 2)
    options: dict[str, Any] = {"page_size": PAGE, "model_dtype": torch.bfloat16, "device": device}
    packed = PagedCache(shapes, scheme, pages=pages, **options)
    pool, tables = PagePool(pages, PAGE, rings), [PageTable() for _ in range(SEQUENCES)]
    for table in tables:
        pool.extend(table, length - 1)
        if rings is not None:
            rings.extend(table, 0)
            rings.trim(table)
    for table in tables:
        pool.extend(table, 1)
    near = None
    if rings is not None:
        arrays = Near.arrays(rings, tables, [1] * SEQUENCES, scheme.page_tokens)
        near = Near.of(on_device(arrays, device), rings.page_size)
    batch = Batch.make(tables, [1] * SEQUENCES, PAGE, device, near)
    exact = None
    if window is not None:
        size, count = (PAGE, pages) if rings is None else (rings.page_size, rings.pages)
        exact = PagedCache(shapes, scheme.exact(torch.bfloat16), pages=count, **{**options, "page_size": size})
    for cache in (packed, exact):
        for plane in () if cache is None else (*cache.keys, *cache.values):
            plane.codes.random_(0, 64)  # in 16 bits small numbers
            if plane.scale is not None:
                plane.scale.fill_(0.01)
    q = torch.randn(SEQUENCES, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    k, v = torch.randn(2, SEQUENCES, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)

    def run() -> None:
        append(
            packed, 0, k, v, batch.slot_mapping, impl=case.impl, positions=batch.positions, exact=exact, near=near,
            skips=False,
        )  # fmt: skip
        attend(q, packed, 0, batch, impl=case.impl, scaling=HEAD_DIM**-0.5, exact=exact, window=window)

    run()
    if case.impl == "reference":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(kept: Callable[[], None] = run) -> None:  # or what the graph reads is freed
        graph.replay()

    return replay


def sample(run: Callable[[], None]) -> float:
    """Microseconds of one of some repeats."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPEATS):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1000 / REPEATS


def main() -> None:
    """Times each case's two steps in turn, then prints them."""
    if not torch.cuda.is_available():
        print("not run: there is no GPU here to time on")
        return
    device = torch.device("cuda")
    rows = []
    print(f"{'scheme':14}{'computed by':14}{'sequences':>14}{'µs sealing':>14}{'µs else':>12}{'more':>8}")
    for case in CASES:
        make = partial(step, case, device=device)
        runs = {"sealing": make(case.tokens), "else": make(case.tokens + 1)}
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(SAMPLES):
            for name, run in runs.items():
                samples[name].append(sample(run))
        sealing, other = (statistics.median(samples[name]) for name in ("sealing", "else"))
        rows.append({"scheme": case.scheme, "impl": case.impl, "tokens": case.tokens, "us": samples})
        place = f"{SEQUENCES} × {case.tokens}"
        print(f"{case.scheme:14}{case.impl:14}{place:>14}{sealing:14.1f}{other:12.1f}{sealing / other - 1:+8.1%}")
        if len(sys.argv) > 1:  # after each, so that a stop loses little
            Path(sys.argv[1]).write_text(json.dumps({"environment": describe(), "rows": rows}, indent=1))
        del runs, make
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
