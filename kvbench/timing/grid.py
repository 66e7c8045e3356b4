"""The grid of a request, cell by cell: the correctness gate first, then the time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvbench.attention import Batch, triton
from kvbench.attention import attend as reference
from kvbench.cache import PagedCache
from kvbench.schemes import Scheme
from kvbench.timing.clock import cold_copies, copy_bandwidth, throttle_reasons, time_calls
from kvbench.timing.peers import time_peers
from kvbench.timing.request import KernelRequest

APPEND_CHUNK = 65536  # tokens written at once when a cache is filled
GATED_QUERIES = 128  # of the last sequence, those compared with the oracle
# the gate of a machine without a GPU: the interpreter takes about 4 ms a program
SMALL_BATCH, SMALL_CONTEXT = 2, 80


@dataclass(frozen=True)
class Timings:
    """Rows of a request, and what they were measured on.

    rows: JSON-ready; `us` and what follows from it are None where nothing was timed or the gate failed.
    device: the GPU's name, or None where the gates ran in the interpreter and nothing was timed.
    break_even: for each dtype, rotation and batch, the context from which on it beats the best 16-bit peer.
    """

    request: KernelRequest
    rows: list[dict[str, Any]]
    device: str | None
    copy_gbps: float | None
    break_even: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Every gate passed."""
        return all(row["gate"] == "ok" for row in self.rows)


def run(request: KernelRequest, progress: Callable[[dict[str, Any]], None] = lambda row: None) -> Timings:
    """Check and time every cell of the request; `progress` is told each row as it is done.

    Without a GPU only the gates run, at a small size and through Triton's interpreter.

    Raises:
        ValueError: an unknown name, or a dtype that no kernel decodes.
        RuntimeError: no GPU, and Triton was imported without its interpreter.
    """
    timed = torch.cuda.is_available()
    if not timed and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("there is no GPU: set TRITON_INTERPRET=1 to run the correctness gates in the interpreter")
    schemes = [Scheme.parse(d, r).resolve(torch.bfloat16) for d in request.dtypes for r in request.rotations or (None,)]
    copy_gbps = copy_bandwidth() if timed else None
    peers: dict[tuple[int, int], dict[str, float]] = {}
    rows = []
    for batch, context in _sizes(request, timed):
        for scheme in schemes:
            row = _row(request, scheme, batch, context, copy_gbps)
            if timed and request.peers and request.op in ("decode", "prefill") and (batch, context) not in peers:
                new = context - request.prefix if request.op == "prefill" else 1
                peers[batch, context] = time_peers(request.shape, batch, context, new, request.samples)
            _measure(row, request, scheme, batch, context, timed)
            _compare(row, peers.get((batch, context), {}))
            rows.append(row)
            progress(row)
    device = torch.cuda.get_device_name() if timed else None
    return Timings(request, rows, device, copy_gbps, _break_even(rows))


def _sizes(request: KernelRequest, timed: bool) -> Iterator[tuple[int, int]]:
    if not timed:
        yield SMALL_BATCH, SMALL_CONTEXT
    elif request.op == "write":
        yield from ((batch, batch) for batch in request.batches)
    else:
        yield from ((batch, context) for batch in request.batches for context in request.contexts)


def _row(request: KernelRequest, scheme: Scheme, batch: int, context: int, copy_gbps: float | None) -> dict[str, Any]:
    shape = request.shape
    return {
        "op": request.op,
        "dtype": scheme.dtype_name,
        "rotation": scheme.rotation_name,
        "batch": batch,
        "context": None if request.op == "write" else context,
        "prefix": request.prefix if request.op in ("prefill", "mixed") else 0,
        "query_heads": shape.query_heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "page_size": shape.page_size,
        "read_bytes": None,
        "us": None,
        "us_p10": None,
        "us_p90": None,
        "launch_us": None,
        "gbps": None,
        "copy_gbps": copy_gbps,
        "share_of_copy": None,
        "best_16bit_us": None,
        "best_16bit_peer": None,
        "speedup": None,
        "rel_error": None,
        "gate": None,
        "throttled": None,
        "samples_us": [],
    }


@dataclass
class _Work:
    """A filled cache, a batch over it, and its queries, or its new keys and values."""

    cache: PagedCache
    batch: Batch
    q: Tensor
    k: Tensor
    v: Tensor
    nbytes: int


def _measure(
    row: dict[str, Any], request: KernelRequest, scheme: Scheme, batch: int, context: int, timed: bool
) -> None:
    """Fills in the gate's verdict and, behind it, the times."""
    work = _make(request, scheme, batch, context, timed)
    row["read_bytes"] = work.nbytes
    row["rel_error"], row["gate"] = _gate_write(work) if request.op == "write" else _gate_attention(work)
    if not timed or row["gate"] != "ok":
        return
    works = [work] + [_make(request, scheme, batch, context, timed) for _ in range(cold_copies(work.nbytes) - 1)]
    sampled = time_calls([partial(_call, request, each) for each in works], request.samples)
    throttled = throttle_reasons()
    row.update(
        us=sampled.median,
        us_p10=sampled.quantile(0.1),
        us_p90=sampled.quantile(0.9),
        launch_us=sampled.launch_us,
        gbps=work.nbytes / sampled.median / 1e3,
        share_of_copy=work.nbytes / sampled.median / 1e3 / row["copy_gbps"],
        throttled=None if throttled is None else list(throttled),
        samples_us=list(sampled.samples_us),
    )


def _make(request: KernelRequest, scheme: Scheme, batch: int, context: int, timed: bool) -> _Work:
    """Caches of normal numbers, pages in random order, bf16 (fp16 where the kernels are interpreted)."""
    shape, op = request.shape, request.op
    device = torch.device("cuda" if timed else "cpu")
    dtype = torch.bfloat16 if timed else torch.float16
    prefix = min(request.prefix, context // 2) if not timed else request.prefix
    if op == "write":
        news, lengths = [batch], [batch]
    else:
        chunk = context - prefix
        news = {"decode": [1] * batch, "prefill": [chunk] * batch, "mixed": [chunk] + [1] * (batch - 1)}[op]
        lengths = [context] * batch
    width = -(-max(lengths) // shape.page_size)
    pages = width * len(lengths)
    cache = PagedCache(
        [(shape.kv_heads, shape.head_dim)],
        scheme,
        pages=pages,
        page_size=shape.page_size,
        model_dtype=dtype,
        device=device,
    )
    table = torch.randperm(pages, device=device).to(torch.int32).view(len(lengths), width)
    slots = (table[:, :, None] * shape.page_size + torch.arange(shape.page_size, device=device)).flatten(1)
    slots = slots[:, : max(lengths)].to(torch.int64)

    def rows(tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, shape.head_dim, device=device).to(dtype)

    if op != "write":
        for part in slots.flatten().split(APPEND_CHUNK):
            triton.append(cache, 0, rows(len(part), shape.kv_heads), rows(len(part), shape.kv_heads), part)
    total = sum(news)
    k, v = (rows(total if op == "write" else 0, shape.kv_heads) for _ in range(2))
    made = Batch(
        torch.tensor([0, *news], device=device).cumsum(0).to(torch.int32),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        table,
        torch.cat([own[length - new : length] for own, length, new in zip(slots, lengths, news, strict=True)]),
        shape.page_size,
    )
    stored = scheme.row_bytes(shape.head_dim) * shape.kv_heads
    if op == "write":  # new keys and values in, codes and scales out
        nbytes = total * (stored + 2 * shape.kv_heads * shape.head_dim * dtype.itemsize)
    else:  # codes, scales and page table, each once
        nbytes = sum(lengths) * stored + table.nbytes
    return _Work(cache, made, rows(total if op != "write" else 0, shape.query_heads), k, v, nbytes)


def _call(request: KernelRequest, work: _Work) -> None:
    if request.op == "write":
        triton.append(work.cache, 0, work.k, work.v, work.batch.slot_mapping)
    else:
        _attend(work)


def _attend(work: _Work) -> Tensor:
    scaling = work.q.shape[-1] ** -0.5
    return triton.attend(
        work.q, work.cache, 0, work.batch, scaling=scaling, sliding_window=None, softcap=None, sinks=None
    )


def _gate_attention(work: _Work) -> tuple[float, str]:
    """The relative L2 error against float64, and "ok" if it is within twice that of torch in the same precision.

    Compared are the last queries of the last sequence, whose whole context they read.
    """
    start, end, length = work.batch.spans[-1]
    new = min(end - start, GATED_QUERIES)
    got = _attend(work)[end - new : end]
    last = Batch(
        torch.tensor([0, new], dtype=torch.int32, device=got.device),
        work.batch.seq_lens[-1:],
        work.batch.page_table[-1:],
        work.batch.slot_mapping[-new:],
        work.batch.page_size,
    )
    q = work.q[end - new : end]
    want = reference(q.double(), work.cache, 0, last, impl="reference", scaling=q.shape[-1] ** -0.5)
    error = _relative(got, want)
    budget = 2 * _relative(_same_precision(q, work, last, length), want)
    # the unit of the 16-bit type stands below the budget: a lucky torch result is no reason to fail
    budget = max(budget, float(torch.finfo(q.dtype).eps))
    return error, "ok" if error <= budget else f"failed: {error:.1e} > {budget:.1e}"


def _same_precision(q: Tensor, work: _Work, last: Batch, length: int) -> Tensor:
    """Attention as torch computes it in q's dtype from keys and values decoded to it."""
    scheme = work.cache.scheme
    pages = last.page_table[0].to(torch.int64)
    k, v = (x.transpose(1, 2).flatten(0, 1)[:length] for x in work.cache.read(0, pages, torch.float32))
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(q.dtype).repeat_interleave(group, 1) for x in (k, v))  # [N, HQ, D]
    queries = scheme.key_rotation.rotate_query(q.float()).to(q.dtype)
    score = torch.einsum("thd,nhd->htn", queries.float(), k.float()) * q.shape[-1] ** -0.5
    position = torch.arange(length - q.shape[0], length, device=q.device)[:, None]
    score = score.masked_fill(torch.arange(length, device=q.device)[None] > position, -torch.inf)
    out = torch.einsum("htn,nhd->thd", score.softmax(-1).to(q.dtype).float(), v.float()).to(q.dtype)
    return scheme.value_rotation.unrotate(out.float()).to(q.dtype)


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def _gate_write(work: _Work) -> tuple[float, str]:
    """The share of bytes that differ from what plain torch writes, and "ok" if none does."""
    want = PagedCache(
        [(work.k.shape[1], work.k.shape[2])],
        work.cache.scheme,
        pages=work.cache.keys[0].codes.shape[0],
        page_size=work.cache.page_size,
        model_dtype=work.k.dtype,
    )
    # on the CPU: that is where the definition is the same bits on every machine
    want.append(0, work.k.cpu(), work.v.cpu(), work.batch.slot_mapping.cpu())
    triton.append(work.cache, 0, work.k, work.v, work.batch.slot_mapping)
    slots = work.batch.slot_mapping.cpu()
    page, offset = slots // want.page_size, slots % want.page_size
    wrong = total = 0
    for expected, plane in ((want.keys[0], work.cache.keys[0]), (want.values[0], work.cache.values[0])):
        for a, b in ((expected.codes, plane.codes), (expected.scale, plane.scale)):
            if a is not None and b is not None:
                differs = a[page, :, offset] != b.cpu()[page, :, offset]
                wrong, total = wrong + int(differs.sum()), total + differs.numel()
    return wrong / total, "ok" if wrong == 0 else f"failed: {wrong} of {total} differ"


def _compare(row: dict[str, Any], peers: dict[str, float]) -> None:
    if peers:
        name = min(peers, key=peers.__getitem__)
        row.update(best_16bit_us=peers[name], best_16bit_peer=name)
        if row["us"] is not None:
            row["speedup"] = peers[name] / row["us"]


def _break_even(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each dtype, rotation and batch the smallest context from which on all were faster than 16 bits."""
    found: dict[tuple[str, str, int], int | None] = {}
    slower: set[tuple[str, str, int]] = set()
    for row in sorted((r for r in rows if r["speedup"] is not None), key=lambda r: -r["context"]):
        key = (row["dtype"], row["rotation"], row["batch"])
        found.setdefault(key, None)
        if row["speedup"] <= 1:
            slower.add(key)
        elif key not in slower:
            found[key] = row["context"]
    return [
        {"dtype": dtype, "rotation": rotation, "batch": batch, "context": context}
        for (dtype, rotation, batch), context in sorted(found.items())
    ]
