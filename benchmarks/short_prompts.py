"""Attention of prompts over many short sequences on one GPU: microseconds by cache and by tile, beside a write.

Random rows of 9 query and 3 KV heads, head_dim 64, in pages of 16: `arc` has questions of 15 to 44 tokens with four
answers of 1 to 8 behind each, as a scoring pass has, and `lambada` 770 texts of 60 to 109 tokens. Each tile's outputs
are compared with those of the tile that the kernels choose.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from kvbench_kernels import prefill as prefills
from kvbench_kernels.attention import attend
from kvbench_kernels.prefill import prefill
from kvbench_kernels.tuning import PrefillTuning
from triton.runtime.errors import OutOfResources

from kvbench.attention import Batch, append
from kvbench.attention import triton as kernels
from kvbench.cache import PagedCache, PagePool
from kvbench.cache.pages import PageTable
from kvbench.environment import describe
from kvbench.schemes import Scheme

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float16)
HQ, HKV, HEAD_DIM, PAGE = 9, 3, 64, 16
# query rows, keys, warps, stages; None: as the kernels choose
TILES = [None, (16, 32, 1, 2), (32, 32, 1, 2), (32, 16, 1, 2), (64, 32, 4, 2)]


def sequences(kind: str) -> list[tuple[int, int]]:
    """(tokens, those that are new) of each sequence."""
    draw = np.random.default_rng(0)
    if kind == "lambada":
        return [(int(n), int(n)) for n in draw.integers(60, 110, 770 if GPU else 3)]
    contexts = [int(n) for n in draw.integers(15, 45, 600 if GPU else 2)]
    answers = [(n + int(m), int(m)) for n in contexts for m in draw.integers(1, 9, 4)]
    return [(n, n) for n in contexts] + answers


def batches(kind: str) -> tuple[Batch, Batch, int]:
    """All tokens of the sequences, their new ones, and how many pages hold them."""
    lengths = sequences(kind)
    pages = sum(-(-n // PAGE) for n, _ in lengths) + 1
    pool, tables = PagePool(pages, PAGE), [PageTable() for _ in lengths]
    for table, (length, _) in zip(tables, lengths, strict=True):
        pool.extend(table, length)
    whole, new = (Batch.make(tables, [pair[which] for pair in lengths], PAGE, DEVICE) for which in (0, 1))
    return whole, new, pages


def microseconds(run: Callable[[], object], samples: int = 6) -> float:
    """Median of the device's events; 0 without a GPU."""
    run()
    if not GPU:
        return 0.0
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return median(1e3 * begin.elapsed_time(end) for begin, end in events)


def rows_of(kind: str, name: str, tiles: list[tuple[int, int, int, int] | None]) -> list[dict[str, object]]:
    """A row a tile."""
    whole, new, pages = batches(kind)
    torch.manual_seed(0)
    q = torch.randn(len(new.slot_mapping), HQ, HEAD_DIM, dtype=DTYPE, device=DEVICE)
    k, v = torch.randn(2, len(whole.slot_mapping), HKV, HEAD_DIM, dtype=DTYPE, device=DEVICE)
    scheme = Scheme.parse(name)
    cache = PagedCache([(HKV, HEAD_DIM)], scheme, pages=pages, page_size=PAGE, model_dtype=DTYPE, device=DEVICE)
    count = len(q)
    store = microseconds(lambda: append(cache, 0, k[:count], v[:count], new.slot_mapping, impl="triton"))
    append(cache, 0, k, v, whole.slot_mapping, impl="triton")
    keys, values = cache.keys[0], cache.values[0]
    turns = {f"{side}_turn": kernels.turn(x.side, HEAD_DIM, x.codes.device) for side, x in (("k", keys), ("v", values))}
    sides, scale = (kernels.side(keys), kernels.side(values)), HEAD_DIM**-0.5
    own = attend(q, *sides, new.page_table, new.seq_lens, new.query_starts, scale=scale, **turns).float()
    found: list[dict[str, object]] = []
    # packed rows read by each program for itself, or copied in 16 bits first
    copied = [False, True] if name != "fp16" and kind == "lambada" else [False]
    for tile, copies in product(tiles, copied):
        out = torch.full_like(q, float("nan"))

        def run(out: torch.Tensor = out, tile: tuple[int, int, int, int] | None = tile) -> None:
            tuning = None if tile is None else PrefillTuning(*tile)
            places = new.page_table, new.seq_lens, new.query_starts
            prefill(q, *sides, *places, scale=scale, out=out, single=True, tuning=tuning, **turns)

        try:
            with mock.patch.object(prefills, "SHORT_SPREAD_ROWS", 1 if copies else 2**20):
                us = microseconds(run)
        except (RuntimeError, OutOfResources) as error:  # no kernel of this tile
            print(kind, name, tile, error, flush=True)
            continue
        error = float((out.float() - own).norm() / own.norm())
        row = {"batch": kind, "dtype": name, "tile": tile, "copied": copies, "us": us, "store_us": store}
        found.append({**row, "against_own": error, "tokens": count, "sequences": len(new.seq_lens)})
        how = f"{tile}, copied first" if copies else f"{tile}"
        print(kind, name, how, f"{us:.0f} µs, a write {store:.0f}, against the kernels' own {error:.1e}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", help="may be repeated; default: fp16, int8, int4 and int2")
    parser.add_argument("--output", type=Path, help="a JSON record")
    options = parser.parse_args()
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        print("not run: there is no GPU here to time on")
        return
    tiles = TILES if GPU else TILES[:1]
    rows: list[dict[str, object]] = []
    for kind in ("arc", "lambada"):
        for name in options.dtype or (("fp16", "int8", "int4", "int2") if GPU else ("int4",)):
            rows += rows_of(kind, name, tiles)
            if options.output:  # of what is stopped, what was done is kept
                options.output.write_text(json.dumps({"environment": describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
