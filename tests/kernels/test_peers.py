"""Peers without their packages: stand-ins attend, in float64, over the very arguments that the real ones get."""

import sys
from dataclasses import replace
from enum import IntEnum
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import scipy.linalg
import torch

from kvbench.attention import attend as reference
from kvbench.render import render
from kvbench.schemes import Scheme
from kvbench.timing import KernelRequest, Shape, document, run
from kvbench.timing.clock import Sampled
from kvbench.timing.grid import Peers, _compare, time_peers
from kvbench.timing.peers import PEERS, peers_of
from kvbench.timing.work import make_work

ON_GPU = torch.cuda.is_available()
EXACT = "bf16" if ON_GPU else "fp16"
SHAPE = Shape(8, 2, 64, 16)
REQUEST = KernelRequest((EXACT,), batches=(3,), contexts=(77,), shape=SHAPE, samples=3)
VLLM_CACHES = {
    EXACT: "none",
    "int8_per_token_head": "none",
    "fp8_per_token_head": "none",
    "int4_per_token_head": "randomized_hadamard",
}


class KVQuantMode(IntEnum):
    """The values that vLLM 0.33 has."""

    NONE = 0
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4


def attended(q, k, v, scaling, causal=True):
    """[T, HQ, D] in float64: T queries at the end of N keys [N, HKV, D]."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    score = torch.einsum("thd,nhd->htn", q.double(), k) * scaling
    if causal:
        ahead = torch.ones(score.shape[1:], dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
        score = score.masked_fill(ahead, -torch.inf)
    return torch.einsum("htn,nhd->thd", score.softmax(-1), v)


def vllm_values(codes, scale, mode):
    """[..., D] float64 of a cache's rows, int4's still turned."""
    if mode == KVQuantMode.NONE:
        return codes.double()
    if mode != KVQuantMode.INT4_PER_TOKEN_HEAD:
        return codes.double() * scale.double()[..., None]
    assert codes.dtype == torch.uint8
    bits = scale.contiguous().view(torch.int32)
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return (nibbles.double() - (bits & 15)[..., None]) * (bits & ~15).view(torch.float32).double()[..., None]


def unified_attention(
    q,
    k,
    v,
    out,
    cu_seqlens_q,
    max_seqlen_q,
    seqused_k,
    max_seqlen_k,
    softmax_scale,
    causal,
    window_size,
    block_table,
    softcap,
    q_descale,
    k_descale,
    v_descale,
    seq_threshold_3D=None,
    num_par_softmax_segments=None,
    softmax_segm_output=None,
    softmax_segm_max=None,
    softmax_segm_expsum=None,
    kv_quant_mode=KVQuantMode.NONE,
    k_scale_cache=None,
    v_scale_cache=None,
):
    """vLLM's signature; k, v [P, S, HKV, D or bytes], their scales [P, S, HKV]."""
    assert causal is True
    assert window_size == (-1, -1)
    assert softcap == 0
    assert q_descale is k_descale is v_descale is None
    _, slots, heads, width = k.shape
    row = 2 * width if kv_quant_mode == KVQuantMode.NONE else 2 * (width + 4)
    assert k.stride() == v.stride() == (slots * heads * row, heads * row, row, 1)
    rows, segments = seq_threshold_3D, num_par_softmax_segments
    assert softmax_segm_output.shape == (rows, q.shape[1], segments, q.shape[2])
    assert softmax_segm_max.shape == softmax_segm_expsum.shape == (rows, q.shape[1], segments)
    lengths = seqused_k.tolist()
    assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), max(lengths))

    d = q.shape[2]
    signs = 2 * torch.bernoulli(torch.full((d,), 0.5), generator=torch.Generator().manual_seed(0x9E3779B9)) - 1
    turn = torch.from_numpy(scipy.linalg.hadamard(d)).double() * signs.double()  # H · (signs ∘ x)
    turned = kv_quant_mode == KVQuantMode.INT4_PER_TOKEN_HEAD
    turn = turn.to(q.device) / d**0.5 if turned else torch.eye(d, device=q.device).double()
    norm = d**0.5 if turned else 1.0  # stored rows carry the unnormalised matrix's
    for i, length in enumerate(lengths):
        own = block_table[i, : -(-length // slots)].long()
        keys, values = (
            vllm_values(x[own], None if s is None else s[own], kv_quant_mode).flatten(0, 1)[:length] / norm
            for x, s in ((k, k_scale_cache), (v, v_scale_cache))
        )
        at = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        out[at] = (attended(q[at].double() @ turn.T, keys, values, softmax_scale) @ turn).to(out.dtype)


class BatchPrefillWithPagedKVCacheWrapper:
    """FlashInfer's signature, as far as it is used."""

    def __init__(self, float_workspace_buffer, kv_layout, backend):
        assert float_workspace_buffer.dtype == torch.uint8
        assert not float_workspace_buffer.any()
        assert kv_layout == "HND"
        assert backend in ("fa2", "fa3")

    def plan(
        self,
        *,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        causal,
        sm_scale,
        q_data_type,
        kv_data_type,
    ):
        planned = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert {x.dtype for x in planned} == {torch.int32}
        self.starts, self.pages, self.indices, self.last = (x.tolist() for x in planned)
        self.heads, self.causal, self.scaling = (num_qo_heads, head_dim_qk), causal, sm_scale
        self.cache, self.dtypes = (num_kv_heads, page_size, head_dim_qk), (q_data_type, kv_data_type)

    def run(self, q, paged_kv_cache, out):
        k, v = paged_kv_cache
        assert q.shape[1:] == self.heads
        assert k.shape[1:] == v.shape[1:] == self.cache
        assert (q.dtype, k.dtype) == self.dtypes
        for i, last in enumerate(self.last):
            own = self.indices[self.pages[i] : self.pages[i + 1]]
            length = (len(own) - 1) * self.cache[1] + last
            keys, values = (x[own].transpose(1, 2).flatten(0, 1)[:length] for x in (k, v))
            at = slice(self.starts[i], self.starts[i + 1])
            out[at] = attended(q[at], keys, values, self.scaling, self.causal).to(out.dtype)
        return out


@pytest.fixture
def installed(monkeypatch):
    """vLLM and FlashInfer, as far as they are used."""

    def install(name, **contents):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    install("flashinfer", BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper)
    install("vllm")
    install("vllm._custom_ops")
    install("vllm.v1.kv_cache_interface", KVQuantMode=KVQuantMode)
    install("vllm.v1.attention.ops.triton_unified_attention", unified_attention=unified_attention)


@pytest.fixture
def timer(monkeypatch):
    """Takes no time: a GPU would be needed for that."""
    timed = []

    def time_calls(calls, samples):
        timed.append(len(calls))
        return Sampled((10.0 * len(timed),) * samples, 1.0)

    monkeypatch.setattr("kvbench.timing.grid.time_calls", time_calls)
    return timed


def work_of(dtype, rotation, **changes):
    scheme = Scheme.parse(dtype, rotation)
    return scheme, make_work(replace(REQUEST, **changes), scheme, 3, 77, ON_GPU)


def peer(name):
    return next(each for each in PEERS if each.name == name)


def error(work, out):
    """The relative L2 error of all outputs against float64 attention over the cache."""
    scaling = work.q.shape[-1] ** -0.5
    want = reference(work.q.double(), work.cache, 0, work.batch, impl="reference", scaling=scaling)
    return float((out.flatten(0, -3).double() - want).norm() / want.norm())


@pytest.mark.parametrize("changes", [{}, {"op": "prefill"}, {"op": "prefill", "prefix": 30}], ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("flashinfer-fa2", EXACT), ("flashinfer-fa3", EXACT), *(("vllm-triton", dtype) for dtype in VLLM_CACHES)],
)
def test_a_peer_gets_the_same_keys_and_values(installed, name, dtype, changes):
    """
    Codes, scales, page tables, lengths and scale are passed as the peer reads them: its output differs from the float64
    reference by its own rounding alone.
    """
    _, work = work_of(dtype, VLLM_CACHES[dtype], **changes)
    (call,) = peer(name).prepare([work])

    assert error(work, call()) <= torch.finfo(work.q.dtype).eps / 2


@pytest.mark.parametrize("name", ["flashinfer-fa2", "vllm-triton"])
def test_a_paged_peer_takes_sequences_of_different_lengths(installed, name):
    """
    A sequence's last page may be full, or its table padded.
    """
    _, work = work_of(EXACT, "none")
    lengths = torch.tensor([77, 33, 64], dtype=torch.int32, device=work.q.device)
    work = replace(work, batch=replace(work.batch, seq_lens=lengths))
    (call,) = peer(name).prepare([work])

    assert error(work, call()) <= torch.finfo(work.q.dtype).eps / 2


@pytest.mark.parametrize("changes", [{}, {"op": "prefill"}, {"op": "prefill", "prefix": 30}], ids=str)
def test_torch_attends_over_the_same_keys_and_values(changes):
    """
    Pages in random order, as contiguous sequences; torch computes in 16 bits, so within the unit of its outputs.
    """
    _, work = work_of(EXACT, "none", **changes)
    (call,) = peer("sdpa-flash").prepare([work])

    assert error(work, call()) <= torch.finfo(work.q.dtype).eps


def test_every_copy_has_a_call_of_its_own(installed):
    """
    Calls in turn read different caches: so nothing is found in a GPU's L2 cache.
    """
    works = [work_of(EXACT, "none")[1] for _ in range(2)]

    for each in PEERS[1:]:
        calls = each.prepare(works)
        outs = [call() for call in calls]
        assert [error(work, out) < 1e-2 for work in works for out in outs] == [True, False, False, True]


def test_peers_are_of_a_cache_that_they_read():
    """
    vLLM's int4 turns by itself, its others don't turn; int2 is in none of its releases.
    """
    names = {dtype: [each.name for each in peers_of(Scheme.parse(dtype, turn))] for dtype, turn in VLLM_CACHES.items()}

    assert names.pop(EXACT) == [each.name for each in PEERS]
    assert set(map(tuple, names.values())) == {("vllm-triton",)}
    for dtype, turn in (("int4", "none"), ("int8", "hadamard"), ("int2", "hadamard"), ("int4:int8", "none")):
        assert peers_of(Scheme.parse(dtype, turn)) == []


def test_what_passes_the_gate_is_timed(installed, timer):
    """
    Over all works; the rest is named with its reason.
    """
    scheme, work = work_of(EXACT, "none")
    peers = time_peers(scheme, [work, work], 3)

    assert {"sdpa-flash", "flashinfer-fa2", "flashinfer-fa3", "vllm-triton"} <= set(peers.us)
    assert set(peers.us) | set(peers.skipped) == {each.name for each in PEERS}
    assert set(timer) == {2}


def test_a_peer_that_is_wrong_is_not_timed_but_named(installed, timer, monkeypatch):
    """
    An output of zeros, and a causal mask that is off by one.
    """
    module = sys.modules["vllm.v1.attention.ops.triton_unified_attention"]
    monkeypatch.setattr(module, "unified_attention", lambda out, **_: out.zero_())
    off_by_one = BatchPrefillWithPagedKVCacheWrapper.run
    monkeypatch.setattr(
        BatchPrefillWithPagedKVCacheWrapper,
        "run",
        lambda self, q, cache, out: off_by_one(self, q.roll(1, 0), cache, out),
    )
    scheme, work = work_of(EXACT, "none", op="prefill")
    peers = time_peers(scheme, [work], 3)

    assert set(peers.us) <= {"sdpa-cudnn", "sdpa-flash"}
    for name in ("flashinfer-fa2", "flashinfer-fa3", "vllm-triton"):
        assert peers.skipped[name].startswith("wrong output, gate failed: ")


def test_a_peer_that_refuses_or_is_absent_is_named(installed, timer, monkeypatch):
    """
    With its own message, or with what to install; the others are timed.
    """

    def refuse(self, **_):
        raise NotImplementedError("head_dim 64\nis too small")

    monkeypatch.setattr(BatchPrefillWithPagedKVCacheWrapper, "plan", refuse)
    monkeypatch.setattr("kvbench.timing.peers.find_spec", lambda name: None if name == "vllm" else object())
    scheme, work = work_of(EXACT, "none")
    peers = time_peers(scheme, [work], 3)

    assert peers.skipped["flashinfer-fa2"] == "NotImplementedError: head_dim 64 is too small"
    assert peers.skipped["vllm-triton"] == "not installed: pip install vllm"
    assert peers.best == "sdpa-flash" if not ON_GPU else peers.best.startswith("sdpa")


def test_a_row_has_its_peers(installed, timer, monkeypatch):
    """
    Those of 16 bits are timed once a size, those of a row's own dtype with the row; what has no time is in it too.
    """
    monkeypatch.setattr("kvbench.timing.grid.PEER_SCHEME", Scheme.parse(EXACT, "none"))
    monkeypatch.setattr("kvbench.timing.grid.copy_bandwidth", lambda: 3000.0)
    monkeypatch.setattr("kvbench.timing.grid.cold_copies", lambda nbytes: 2)
    monkeypatch.setattr("kvbench.timing.grid.throttle_reasons", lambda: ())
    monkeypatch.setattr("kvbench.timing.grid.make_work", lambda *args: make_work(*args[:-1], ON_GPU))
    monkeypatch.setattr("kvbench.timing.grid.triton.lacking", lambda *_: "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")

    def wrong_in_int8(**given):
        unified_attention(**given)
        if given.get("kv_quant_mode") == KVQuantMode.INT8_PER_TOKEN_HEAD:
            given["out"] *= 1.1

    module = sys.modules["vllm.v1.attention.ops.triton_unified_attention"]
    monkeypatch.setattr(module, "unified_attention", wrong_in_int8)
    timings = run(replace(REQUEST, dtypes=("int4", "int8", "int2", EXACT)))
    int4, int8, int2, exact = timings.rows

    sixteen = int4["peers"]
    assert {"sdpa-flash", "flashinfer-fa2", "flashinfer-fa3", "vllm-triton"} <= set(sixteen)
    assert all(row["peers"] == sixteen and row["best_16bit_us"] == min(sixteen.values()) for row in timings.rows)
    assert int4["same_dtype_peer"] == "vllm-triton"
    assert int4["same_dtype_speedup"] == int4["same_dtype_us"] / int4["us"]
    assert int8["same_dtype_us"] is int2["same_dtype_us"] is exact["same_dtype_us"] is None
    assert int8["peers_skipped"]["vllm-triton int8_per_token_head"].startswith("wrong output")
    # four or five peers, four rows of ours and vLLM's int4, each over two copies
    assert timer == [2] * (len(sixteen) + 4 + 1)


def test_a_table_shows_every_peer_and_what_is_missing():
    """
    The fastest of 16 bits in each row, all of them below the table, and once what has no time.
    """
    timings = run(replace(REQUEST, dtypes=("int4",), peers=False))
    row = timings.rows[0]
    row.update(us=100.0, us_p10=99.0, us_p90=101.0, same_dtype_us=1050.0, same_dtype_peer="vllm-triton")
    row["same_dtype_speedup"] = 10.5
    _compare(row, Peers({"sdpa-flash": 380.0, "sdpa-cudnn": 350.0}, {"vllm-triton": "not installed"}))

    assert (row["best_16bit_peer"], row["best_16bit_us"], row["speedup"]) == ("sdpa-cudnn", 350.0, 3.5)
    for how in ("table", "md"):
        text = render(document([timings]), how)
        assert "3.50 × (sdpa-cudnn 350)" in text
        assert "10.50 × (vllm-triton 1050)" in text
        assert ", µs: sdpa-cudnn 350.0, sdpa-flash 380.0" in text
        assert text.count("vllm-triton was not timed: not installed") == 1
    assert '"{""sdpa-flash"": 380.0, ""sdpa-cudnn"": 350.0}"' in render(document([timings]), "csv")
