"""Writes the tables of docs/kernels.md from the committed records, between its marks: `make docs`; a test compares."""

import json
import runpy
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "kernels.md"
renewed = runpy.run_path(str(ROOT / "docs" / "renew.py"))["renewed"]
GRID, BLOCKS, WINDOWS = "kernels-h200", "kernels-blocks-h200", "windows-h200.json"
TIERS, COUNTERS = "kernels-tiers-h200", "counters-h200.json"
CENTRES = "checks-h200/centres.txt"
ABSENT = "–"
USUAL = (32, 8, 128, 64)  # query heads, KV heads, head_dim, page size
SIZES = ((1, 8192), (1, 32768), (8, 8192), (8, 32768), (32, 8192), (32, 32768))
DECODED = (
    "fp16",
    "bf16",
    "fp8_per_tensor",
    "fp8_per_token_head",
    "int8_per_token_head",
    "int4_per_token_head",
    "int2_per_token_head",
)
SHAPES = {
    "MHA 32/32": (32, 32, 128, 64),
    "GQA 16 (64/4)": (64, 4, 128, 64),
    "MQA 32/1": (32, 1, 128, 64),
    "D 64": (32, 8, 64, 64),
    "D 256 (16/8)": (16, 8, 256, 64),
    "pages of 16": (32, 8, 128, 16),
    "pages of 128": (32, 8, 128, 128),
    "28/4 at 16×4k": (28, 4, 128, 64),
    "24/8, D 96 at 16×4k": (24, 8, 96, 64),
}
FOUR = ("fp16", "int8_per_token_head", "int4_per_token_head", "int2_per_token_head")
BLOCKED = ("fp16", "int4_per_token_head", "q8_0", "mxfp8", "q4_0", "nvfp4", "mxfp4", "int3_per_token_head")
WRITTEN = ("q8_0", "mxfp8", "q4_0", "nvfp4", "mxfp4", "int3_per_token_head")
DESIGNS = {
    "base": "before the first tile, three tiles asked for meanwhile",
    "noab": "the same, one tile asked for (as it is now)",
    "ahead": "three tiles; a page's number loaded one tile ahead",
    "flat": "three tiles; pages not through the pipeline, products in three chains",
    "aff": "the last two together, one tile",
    "cl3": "by a launch before, ahead of its time",
}
TIERED = "tiers421_per_token_head:midrise2_per_token_head"
TIER_FORMS = {
    "keys sorted": (TIERED, "rank:hadamard"),
    "keys sorted, window": (f"{TIERED}+w64s4", "rank:hadamard"),
    "keys centred by page and sorted": (TIERED, "center+rank:hadamard"),
    "both (`tiers421_centered_window`)": (f"{TIERED}+w64s4", "center+rank:hadamard"),
}
PIPES = {
    "issue": "issue slots",
    "alu": "integer",
    "fma": "float",
    "xu": "special",
    "tensor": "tensor",
    "l1": "L1 and shared",
    "l2": "L2",
    "dram": "DRAM",
}
SCHEDULERS = 132 * 4
WAITS = {
    "wait": "fixed latency",
    "math_pipe_throttle": "a pipe",
    "not_selected": "its turn",
    "dispatch_stall": "dispatch",
    "long_scoreboard": "memory",
    "short_scoreboard": "shared memory, special functions",
    "mio_throttle": "their queue",
    "lg_throttle": "the queue of loads",
    "barrier": "a barrier",
    "branch_resolving": "a branch",
    "no_instruction": "instructions",
    "imc_miss": "constants",
    "drain": "stores at the end",
}
MISS = 0.8  # of the share at 32/8 heads that a shape must reach
WINDOWED = {
    "{}": ("{}_per_token_head", "hadamard"),
    "{}, window": ("{}_per_token_head+w64s4", "hadamard"),
    "{}, centres by page": ("{}_per_token_head", "center+hadamard:hadamard"),
    "{}, both": ("{}_per_token_head+w64s4", "center+hadamard:hadamard"),
}


@cache
def rows(folder: str) -> tuple[dict[str, Any], ...]:
    """What was timed, of each record of results/FOLDER."""
    records = [
        json.loads(path.read_text()) for path in sorted((ROOT / "results" / folder / "cells").glob("*/record.json"))
    ]
    return tuple(record["facts"] for record in records if record["status"] == "done" and record["facts"]["us"])


def found(
    folder: str, op: str, batch: int, context: int | None, shape: tuple[int, ...], dtype: str, prefix: int = 0
) -> dict[str, Any] | None:
    """The row, where there are several rotations that of the dtype's own."""
    names = ("query_heads", "kv_heads", "head_dim", "page_size")
    some = [
        row
        for row in rows(folder)
        if (row["op"], row["batch"], row["prefix"], row["dtype"]) == (op, batch, prefix, dtype)
        and tuple(row[name] for name in names) == shape
        and (context is None or row["context"] == context)
    ]
    own = {
        "int4_per_token_head": "randomized_hadamard",
        "int2_per_token_head": "hadamard",
        "int3_per_token_head": "randomized_hadamard",
    }
    wanted = [row for row in some if row["rotation"] == own.get(dtype, "none")] or some
    return wanted[0] if wanted else None


def us(value: float | None) -> str:
    """Microseconds in three digits."""
    return ABSENT if value is None else f"{value:.{0 if value >= 100 else 1}f}"


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(line) + " |" for line in lines)]
    )


def size(batch: int, context: int) -> str:
    """A size as the page names it."""
    return f"{batch}×{context // 1024}k"


def decode() -> str:
    """Times, shares of the copy bandwidth and ratios to the fastest 16-bit peer, by size."""
    lines = []
    peers = [found(GRID, "decode", *at, USUAL, "fp16") for at in SIZES]
    lines.append(["fastest of torch's SDPA, bf16", *(us(row and row["best_16bit_us"]) for row in peers)])
    for dtype in DECODED:
        cells = []
        for at in SIZES:
            row = found(GRID, "decode", *at, USUAL, dtype)
            cells.append(
                ABSENT
                if row is None
                else f"{us(row['us'])} ({row['share_of_copy']:.0%}; {row['speedup']:.2f}×)".replace("%", " %")
            )
        lines.append([dtype, *cells])
    return table(["", *(size(*at) for at in SIZES)], lines)


def shape_rows() -> list[tuple[str, str, float, float]]:
    """Of each other shape and dtype its share of the copy bandwidth, and that as a part of the usual shape's."""
    there = []
    for name, shape in SHAPES.items():
        at = place(name)
        for dtype in FOUR:
            row, usual = found(GRID, "decode", *at, shape, dtype), found(GRID, "decode", 32, 8192, USUAL, dtype)
            if row and usual:
                there.append((name, dtype, row["share_of_copy"], row["share_of_copy"] / usual["share_of_copy"]))
    return there


def shapes() -> str:
    """Each shape's share of the copy bandwidth, and in bold what is not within 20 % of the share at 32/8 heads."""
    by = {(name, dtype): (share, part) for name, dtype, share, part in shape_rows()}
    lines = []
    for name in SHAPES:
        if (name, FOUR[0]) not in by:
            continue
        cells = []
        for dtype in FOUR:
            share, part = by[name, dtype]
            cell = f"{share:.0%} ({part:.2f})".replace("%", " %")
            cells.append(f"**{cell}**" if part < MISS else cell)
        lines.append([name, *cells])
    return table(["", *(dtype.removesuffix("_per_token_head") for dtype in FOUR)], lines)


def place(name: str) -> tuple[int, int]:
    """Batch and context that a shape is timed at."""
    return (16, 4096) if "16×4k" in name else (32, 8192)


def centres() -> str:
    """Ways to compute centres by page of int4's keys, as checks-h200/centres.txt has them."""
    by: dict[str, dict[tuple[str, str], str]] = {}
    for line in (ROOT / "results" / CENTRES).read_text(encoding="utf-8").splitlines():
        name, _, size, *_, dtype, _, median, _, _, _, _ = line.replace("['power cap']", "").split()
        by.setdefault(name.split("-")[1], {})[size, dtype] = us(float(median))
    columns = [(at, dtype) for at in ("8x8192", "32x8192", "1x32768") for dtype in ("int4", "int4+w64s4")]
    head = [
        "",
        *(
            f"{at.replace('x8192', '×8k').replace('x32768', '×32k')}{', window' if '+' in dtype else ''}"
            for at, dtype in columns
        ),
    ]
    return table(head, [[text, *(by[name][column] for column in columns)] for name, text in DESIGNS.items()])


def prompts() -> str:
    """Prefill, with its ratio to the peer's time."""
    lines = []
    for dtype in ("bf16", "fp8_per_tensor", *FOUR[1:]):
        cells = []
        for context, prefix in ((4096, 0), (32768, 28672)):
            row = found(GRID, "prefill", 1, context, USUAL, dtype, prefix)
            cells.append(ABSENT if row is None else f"{us(row['us'])} ({1 / row['speedup']:.2f})")
        lines.append([dtype, *cells])
    return table(["", "1×4096", "4096 new after 28k"], lines)


def writes() -> str:
    """Writes of so many tokens."""
    lines = [
        [dtype, *(us(row and row["us"]) for row in (found(folder, "write", n, None, USUAL, dtype) for n in (64, 4096)))]
        for folder, dtypes in ((GRID, FOUR[1:]), (BLOCKS, WRITTEN))
        for dtype in dtypes
    ]
    return table(["", "64 tokens", "4096 tokens"], lines)


def blocks() -> str:
    """Blocks and codes of 3 bits beside fp16 and int4: decode, and a prompt."""
    lines = []
    for dtype in BLOCKED:
        cells = []
        for at, shape in (((1, 32768), USUAL), ((8, 8192), USUAL), ((32, 8192), USUAL), ((32, 8192), (32, 8, 64, 64))):
            row = found(BLOCKS, "decode", *at, shape, dtype)
            cells.append(ABSENT if row is None else f"{us(row['us'])} ({row['share_of_copy']:.0%})".replace("%", " %"))
        row = found(BLOCKS, "prefill", 1, 4096, USUAL, dtype)
        lines.append([dtype, *cells, us(row and row["us"])])
    return table(["", "1×32k", "8×8k", "32×8k", "32×8k, D 64", "prefill 1×4096"], lines)


def tiers() -> str:
    """Keys in tiers beside fp16 and int4: decode, shares of copy and ratios to the fastest peer; writes; a prompt."""
    places = ((1, 32768), (8, 8192), (32, 8192))
    peers = [(found(TIERS, "decode", *at, USUAL, "fp16") or {}).get("best_16bit_us") for at in places]
    lines = [["fastest of torch's SDPA, bf16", *(us(peer) for peer in peers), ABSENT, ABSENT, ABSENT]]
    for name, (dtype, rotation) in {
        "fp16": ("fp16", "none"),
        "int4": ("int4_per_token_head", "randomized_hadamard"),
        **TIER_FORMS,
    }.items():
        by = {
            (row["op"], row["batch"], row["context"]): row
            for row in rows(TIERS)
            if (row["dtype"], row["rotation"]) == (dtype, rotation)
        }
        cells = []
        for at, peer in zip(places, peers, strict=True):
            row = by.get(("decode", *at))
            ratio = "" if row is None or peer is None else f"; {peer / row['us']:.2f}×"
            cells.append(
                ABSENT if row is None else f"{us(row['us'])} ({row['share_of_copy']:.0%}{ratio})".replace("%", " %")
            )
        rest = (by.get(("write", 64, None)), by.get(("write", 4096, None)), by.get(("prefill", 1, 4096)))
        lines.append([name, *cells, *(us(row and row["us"]) for row in rest)])
    return table(["", *(size(*at) for at in places), "write 64", "write 4096", "prefill 1×4096"], lines)


def counters() -> str:
    """What Nsight Compute counted of each cell's main kernel: how busy its parts were, and what a warp waited for."""
    counted = json.loads((ROOT / "results" / COUNTERS).read_text())["rows"]
    lines = []
    for row in counted:
        if row["kernel"] not in ("_decode_kernel", "_store_kernel"):
            continue
        name = counted_name(row)
        others = [one["us"] for one in counted if one is not row and counted_name(one) == name]
        waits = sorted(((row[wait] or 0, text) for wait, text in WAITS.items()), reverse=True)[:3]
        most = max(PIPES, key=lambda pipe: row[pipe] or 0)
        cells = [us(row["us"]), us(sum(others)) if others else ABSENT]
        cells += [f"**{row[pipe]:.0f}**" if pipe == most else f"{row[pipe]:.0f}" for pipe in PIPES]
        cells += [
            f"{row['instructions'] / SCHEDULERS / 1e3:.1f}",
            f"{row['warps']:.1f}",
            f"{100 * row['warps'] / row['issue']:.1f}",
        ]
        lines.append([name, *cells, ", ".join(f"{text} {value:.2f}" for value, text in waits)])
    head = [
        "",
        "µs",
        "others, µs",
        *(f"{text}, %" for text in PIPES.values()),
        "thousand instructions",
        "warps",
        "cycles",
        "waits for",
    ]
    return table(head, lines)


def counted_name(row: dict[str, Any]) -> str:
    """A cell of the counters as the page names it."""
    names = {
        (32, 8, 128): "",
        (64, 4, 128): "64/4, ",
        (32, 1, 128): "MQA 32/1, ",
        (28, 4, 128): "28/4, ",
        (24, 8, 96): "24/8, D 96, ",
    }
    heads = tuple(int(n) for n in row["heads"].split("/"))
    dtype = row["dtype"].replace("_per_token_head", "").replace(":midrise2", "")
    more = ["centres by page"] if "center" in row["rotation"] else []
    where = f"write {row['batch']}" if row["op"] == "write" else size(row["batch"], row["context"])
    return ", ".join([f"{names[(*heads, row['head_dim'])]}{dtype} at {where}", *more])


def windows() -> str:
    """What windows and centres cost beside the same dtype without them, in the same run."""
    timed = json.loads((ROOT / "results" / WINDOWS).read_text())["rows"]
    by = {(row["op"], row["batch"], row["context"], row["dtype"], row["rotation"]): row["us"] for row in timed}
    places = (
        ("decode", 8, 8192),
        ("decode", 32, 8192),
        ("decode", 1, 32768),
        ("write", 4096, 0),
        ("write", 4096, None),
    )
    lines = []
    for name in ("int8", "int4", "int2"):
        for form, (dtype, rotation) in WINDOWED.items():
            cells = []
            for place in places[:3]:
                value = by.get((*place, dtype.format(name), rotation))
                plain = by.get((*place, f"{name}_per_token_head", "hadamard"))
                more = (
                    ""
                    if form == "{}" or value is None or plain is None
                    else f" ({value / plain - 1:+.0%})".replace("%", " %")
                )
                cells.append(us(value) + more)
            value = next(
                (by[key] for place in places[3:] if (key := (*place, dtype.format(name), rotation)) in by), None
            )
            plain = next(
                (by[key] for place in places[3:] if (key := (*place, f"{name}_per_token_head", "hadamard")) in by), None
            )
            more = (
                ""
                if form == "{}" or value is None or plain is None
                else f" ({value / plain - 1:+.0%})".replace("%", " %")
            )
            if any(cell != ABSENT for cell in (*cells, us(value))):
                lines.append([form.format(name), *cells, us(value) + more])
    return table(["under `hadamard`", "8×8k", "32×8k", "1×32k", "write 4096"], lines)


def steps() -> str:
    """What a decode step of int4 writes more for a window, as a part of the step."""
    timed = json.loads((ROOT / "results" / WINDOWS).read_text())["rows"]
    by = {(row["op"], row["batch"], row["dtype"], row["rotation"]): row["us"] for row in timed}
    lines = []
    for name, rotation in (("int4", "hadamard"), ("int4, centres by page", "center+hadamard:hadamard")):
        plain, both = (
            by["write", 64, dtype, rotation] for dtype in ("int4_per_token_head", "int4_per_token_head+w64s4")
        )
        step = by["decode", 32, "int4_per_token_head+w64s4", rotation]
        lines.append([name, us(plain), us(both), us(step), f"{(both - plain) / (step + both):.1%}".replace("%", " %")])
    return table(["", "write 64", "the same, in 16 bits too", "decode 32×8k, window", "more a step"], lines)


TABLES = {
    "decode": decode,
    "shapes": shapes,
    "centres": centres,
    "prompts": prompts,
    "writes": writes,
    "blocks": blocks,
    "windows": windows,
    "tiers": tiers,
    "counters": counters,
    "steps": steps,
}


def page() -> str:
    """docs/kernels.md with its tables made anew."""
    made: str = renewed(PAGE, TABLES)
    return made


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
