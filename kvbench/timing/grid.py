"""The grid of a request, cell by cell: the correctness gate first, then the time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
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
from kvbench.timing.peers import SIXTEEN_BITS, Peer, peers_of
from kvbench.timing.request import KernelRequest
from kvbench.timing.work import Work, make_work
from kvbench.transforms.base import POSITIONS

REFUSED = "refused: "  # a gate's verdict on what no kernel can serve
DTYPES = {True: torch.bfloat16, False: torch.float16}  # of queries: the interpreter has no bf16
REASON = 160  # characters of a peer's refusal that are kept
GATED_QUERIES = 128  # of the last sequence, those compared with the oracle
COMPARED = ("decode", "prefill")  # the operations that peers are timed in
PEER_SCHEME = Scheme.parse("bf16", "none")  # what the 16-bit peers read
# the gate of a machine without a GPU: the interpreter takes about 4 ms a program
SMALL_BATCH, SMALL_CONTEXT = 2, 80


@dataclass(frozen=True)
class Timings:
    """Rows of a request, and what they were measured on.

    rows: JSON-ready; `us` and what follows from it are None where nothing was timed or the gate failed. `peers` has
        the microseconds of each 16-bit peer, `same_dtype_us` those of a peer that reads the row's own dtype, and
        `peers_skipped` why a peer has no time.
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
        """Every gate passed of what kernels can serve, and there is something that they can."""
        verdicts = [row["gate"] for row in self.rows if not row["gate"].startswith(REFUSED)]
        return bool(verdicts) and all(verdict == "ok" for verdict in verdicts)


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
    schemes = request.schemes()
    copy_gbps = copy_bandwidth() if timed else None
    compared = timed and request.peers and request.op in COMPARED
    rows = []
    for batch, context in _sizes(request, timed):
        peers = Peers()
        if compared:
            make = partial(make_work, request, PEER_SCHEME, batch, context, timed)
            peers = time_peers(PEER_SCHEME, _cold(make(), make), request.samples)
        for scheme in schemes:
            row = _row(request, scheme, batch, context, copy_gbps)
            where = torch.device("cuda" if timed else "cpu")
            if why := triton.lacking(scheme, DTYPES[timed], where, [request.shape.head_dim]):
                row["gate"] = f"{REFUSED}{why}"
            else:
                _measure(row, request, scheme, batch, context, timed)
            _compare(row, peers)
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
        **scheme.columns(),
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
        "peers": {},
        "peers_skipped": {},
        "same_dtype_us": None,
        "same_dtype_peer": None,
        "same_dtype_speedup": None,
        "rel_error": None,
        "gate": None,
        "throttled": None,
        "samples_us": [],
    }


def _measure(
    row: dict[str, Any], request: KernelRequest, scheme: Scheme, batch: int, context: int, timed: bool
) -> None:
    """Fills in the gate's verdict and, behind it, the times."""
    work, row["rel_error"], row["gate"] = gated(request, scheme, batch, context, timed)
    row["read_bytes"] = work.nbytes
    if not timed or row["gate"] != "ok":
        return
    works = _cold(work, partial(make_work, request, scheme, batch, context, timed))
    sampled = time_calls([partial(call, request, each) for each in works], request.samples)
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
    if request.peers and request.op in COMPARED and (scheme.dtype_name, scheme.rotation_name) not in SIXTEEN_BITS:
        same = time_peers(scheme, works, request.samples)
        row["peers_skipped"] = {f"{name} {scheme.dtype_name}": why for name, why in same.skipped.items()}
        if same.best:
            row.update(same_dtype_us=same.us[same.best], same_dtype_peer=same.best)
            row["same_dtype_speedup"] = same.us[same.best] / sampled.median


def gated(request: KernelRequest, scheme: Scheme, batch: int, context: int, timed: bool) -> tuple[Work, float, str]:
    """What is timed of a cell, the error of what was computed on it once, and the gate's verdict."""
    work = make_work(request, scheme, batch, context, timed)
    error, verdict = _gate_write(work) if request.op == "write" else _gate_attention(work, _attend(work))
    return work, error, verdict


def _cold(first: Work, make: Callable[[], Work]) -> list[Work]:
    """This work and others like it: so many that none is found in the L2 cache when its turn comes."""
    return [first, *(make() for _ in range(cold_copies(first.nbytes) - 1))]


def call(request: KernelRequest, work: Work) -> None:
    """What is timed."""
    if request.op == "write":
        triton.append(work.cache, 0, work.k, work.v, work.batch.slot_mapping, work.batch.positions, work.exact)
    else:
        _attend(work)


def _attend(work: Work) -> Tensor:
    scaling = work.q.shape[-1] ** -0.5
    return triton.attend(
        work.q,
        work.cache,
        0,
        work.batch,
        scaling=scaling,
        sliding_window=None,
        softcap=None,
        sinks=None,
        exact=work.exact,
        window=work.cache.scheme.window,
    )


def _gate_attention(work: Work, out: Tensor) -> tuple[float, str]:
    """The relative L2 error against float64, and "ok" if it is within twice that of torch in the same precision.

    out: [T, HQ, D], what attention gave. Compared are the last queries of the last sequence, whose whole context they
    read.
    """
    start, end, length = work.batch.spans[-1]
    new = min(end - start, GATED_QUERIES)
    got = out[end - new : end]
    last = Batch(
        torch.tensor([0, new], dtype=torch.int32, device=got.device),
        work.batch.seq_lens[-1:],
        work.batch.page_table[-1:],
        work.batch.slot_mapping[-new:],
        work.batch.page_size,
    )
    q = work.q[end - new : end]
    scaling, window = q.shape[-1] ** -0.5, work.cache.scheme.window
    want = reference(
        q.double(), work.cache, 0, last, impl="reference", scaling=scaling, exact=work.exact, window=window
    )
    error = _relative(got, want)
    budget = 2 * _relative(_same_precision(q, work, last, length), want)
    # the unit of the 16-bit type stands below the budget: a lucky torch result is no reason to fail
    budget = max(budget, float(torch.finfo(q.dtype).eps))
    return error, "ok" if error <= budget else f"failed: {error:.1e} > {budget:.1e}"


def _same_precision(q: Tensor, work: Work, last: Batch, length: int) -> Tensor:
    """Attention as torch computes it in q's dtype from keys and values decoded to it."""
    keys, values = work.cache.keys[0], work.cache.values[0]
    pages = last.page_table[0].to(torch.int64)
    group = q.shape[1] // keys.codes.shape[1]
    queries = keys.side.query(q.float(), keys.params).to(q.dtype)
    token = torch.arange(length, device=q.device)[None]
    position = torch.arange(length - q.shape[0], length, device=q.device)[:, None]
    is_exact = torch.zeros(1, 1, dtype=torch.bool, device=q.device)
    window = work.cache.scheme.window
    if window is not None:
        is_exact = (token < window.sinks) | (token >= window.starts(position))  # [T, N]
    scores, rows = [], []
    for cache in (work.cache, work.exact):
        if cache is not None:
            k, v = (x.transpose(1, 2).flatten(0, 1)[:length] for x in cache.read(0, pages, torch.float32))
            k, v = (x.to(q.dtype).repeat_interleave(group, 1) for x in (k, v))  # [N, HQ, D]
            scores.append(torch.einsum("thd,nhd->htn", queries.float(), k.float()))
            rows.append(v)
    score = torch.where(is_exact, scores[-1], scores[0])
    lacks = keys.side.score(q.float(), keys.params)  # [T, HQ, P]
    if lacks is not None:
        score = score + lacks[..., (token[0] // POSITIONS).clamp_max(lacks.shape[-1] - 1)].transpose(0, 1)
    score = (score * q.shape[-1] ** -0.5).masked_fill(token > position, -torch.inf)
    weight = score.softmax(-1).to(q.dtype).float()
    parts = [(weight * ~is_exact, rows[0]), (weight * is_exact, rows[-1])]
    out = sum(torch.einsum("htn,nhd->thd", share, v.float()) for share, v in parts)
    assert isinstance(out, Tensor)
    out = out.to(q.dtype)
    return values.side.undo(out.float(), values.params).to(q.dtype)


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def _gate_write(work: Work) -> tuple[float, str]:
    """The share of bytes that differ from what plain torch writes, and "ok" if none does."""
    slots, positions = work.batch.slot_mapping, work.batch.positions
    triton.append(work.cache, 0, work.k, work.v, slots, positions, work.exact)
    wrong = total = 0
    for cache in (work.cache, work.exact):
        if cache is None:
            continue
        want = PagedCache(
            [(work.k.shape[1], work.k.shape[2])],
            cache.scheme,
            pages=cache.pages,
            page_size=cache.page_size,
            learned=[(cache.keys[0].params, cache.values[0].params)],
            model_dtype=work.k.dtype,
        )
        # on the CPU: that is where the definition is the same bits on every machine
        want.append(0, work.k.cpu(), work.v.cpu(), slots.cpu(), positions.cpu())
        page, offset = slots.cpu() // want.page_size, slots.cpu() % want.page_size
        for expected, plane in ((want.keys[0], cache.keys[0]), (want.values[0], cache.values[0])):
            pairs = (expected.codes, plane.codes), (expected.rest, plane.rest), (expected.scale, plane.scale)
            for a, b in pairs:
                if a is not None and b is not None:
                    differs = a[page, :, offset] != b.cpu()[page, :, offset]
                    wrong, total = wrong + int(differs.sum()), total + differs.numel()
    return wrong / total, "ok" if wrong == 0 else f"failed: {wrong} of {total} differ"


@dataclass(frozen=True)
class Peers:
    """Median microseconds of each peer that could be timed, and for each other one the reason."""

    us: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> str | None:
        """The name of the fastest."""
        return min(self.us, key=self.us.__getitem__, default=None)


def time_peers(scheme: Scheme, works: Sequence[Work], samples: int) -> Peers:
    """The times of all peers that read this scheme. What a peer computes passes the gate of our own kernels first."""
    found = Peers()
    for peer in peers_of(scheme):
        try:
            if why := peer.missing or _fault(peer, works):
                found.skipped[peer.name] = why
            else:
                found.us[peer.name] = time_calls(peer.prepare(works), samples).median
        except Exception as error:  # with what it refuses a shape is up to each peer
            found.skipped[peer.name] = " ".join(f"{type(error).__name__}: {error}".split())[:REASON]
    return found


def _fault(peer: Peer, works: Sequence[Work]) -> str | None:
    """What is wrong with a peer's output, or None."""
    (call,) = peer.prepare(works[:1])
    _, verdict = _gate_attention(works[0], call().flatten(0, -3))
    return None if verdict == "ok" else f"wrong output, gate {verdict}"


def _compare(row: dict[str, Any], peers: Peers) -> None:
    row.update(peers=peers.us, peers_skipped={**peers.skipped, **row["peers_skipped"]})
    if peers.best:
        row.update(best_16bit_us=peers.us[peers.best], best_16bit_peer=peers.best)
        if row["us"] is not None:
            row["speedup"] = peers.us[peers.best] / row["us"]


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
