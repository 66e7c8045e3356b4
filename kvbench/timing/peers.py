"""Attention as others compute it, over the same keys and values: what a time of ours stands beside."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kvbench.cache import PagedCache
from kvbench.cache.paged import Plane
from kvbench.dtypes.seed import export_rows
from kvbench.schemes import Scheme
from kvbench.timing.work import Work
from kvbench.transforms import Rotation, all_rotations

Call = Callable[[], Tensor]

SIXTEEN_BITS = frozenset({("fp16", "none"), ("bf16", "none")})
EXPORTED_PAGES = 512  # at once: unpacked codes take many times their memory


@dataclass(frozen=True)
class Peer:
    """Someone else's attention kernel.

    schemes: (dtype, rotation) of the caches that it reads.
    prepare: for each work a call that attends; the outputs are [T, HQ, D], or [B, T/B, HQ, D] where only a copy would
        make them so. It raises whatever the peer raises on what it can't do.
    module, package: what must be installed, and what pip calls it; None for torch itself.
    """

    name: str
    schemes: frozenset[tuple[str, str]]
    prepare: Callable[[Sequence[Work]], list[Call]]
    module: str | None = None
    package: str | None = None

    @property
    def missing(self) -> str | None:
        """Why it can't run here, or None where it is installed."""
        if self.module is None or find_spec(self.module) is not None:
            return None
        return f"not installed: pip install {self.package}"


def peers_of(scheme: Scheme) -> list[Peer]:
    """The peers that read caches of this scheme."""
    return [peer for peer in PEERS if (scheme.dtype_name, scheme.rotation_name) in peer.schemes]


def _scaling(work: Work) -> float:
    return float(work.q.shape[-1] ** -0.5)


# ---- torch


def _prepare_sdpa(backend: SDPBackend, works: Sequence[Work]) -> list[Call]:
    """scaled_dot_product_attention by one backend, over contiguous copies of keys and values."""
    return [partial(_sdpa, backend, *_contiguous(work)) for work in works]


def _contiguous(work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, HQ, T/B, D], k and v [B, HKV, N, D]: B sequences of the same lengths."""
    table, length = work.batch.page_table, work.batch.spans[0][2]
    k, v = (
        x.unflatten(0, table.shape).transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous()
        for x in work.cache.read(0, table.flatten().to(torch.int64), work.q.dtype)
    )
    return work.q.unflatten(0, (len(table), -1)).transpose(1, 2).contiguous(), k, v


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        new, context = q.shape[2], k.shape[2]
        if new in (1, context):
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=new > 1, enable_gqa=True)
        else:
            mask = causal_lower_right(new, context)
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


# ---- FlashInfer

FLASHINFER_WORKSPACE = 2**27  # bytes; what FlashInfer's documentation recommends


def _prepare_flashinfer(backend: str, works: Sequence[Work]) -> list[Call]:
    """BatchPrefillWithPagedKVCacheWrapper over our own pages, planned beforehand.

    With one query a sequence it is the kernel that BatchDecodeWithPagedKVCacheWrapper takes with `use_tensor_cores`
    (flashinfer/decode.py of 0.7.2).
    """
    flashinfer: Any = import_module("flashinfer")
    # scratch of splits: the calls run one after another and share it
    workspace = torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=works[0].q.device)
    calls: list[Call] = []
    for work in works:
        q, batch, page_size = work.q, work.batch, work.cache.page_size
        k, v = _stored_values(work.cache)  # [P, HKV, S, D]
        counts = -(-batch.seq_lens // page_size)
        used = torch.arange(batch.page_table.shape[1], device=q.device) < counts[:, None]
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend=backend)
        wrapper.plan(
            qo_indptr=batch.query_starts,
            paged_kv_indptr=functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
            paged_kv_indices=batch.page_table[used],
            paged_kv_last_page_len=batch.seq_lens - (counts - 1) * page_size,
            num_qo_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim_qk=q.shape[2],
            page_size=page_size,
            causal=len(q) > len(batch.seq_lens),
            sm_scale=_scaling(work),
            q_data_type=q.dtype,
            kv_data_type=k.dtype,
        )
        calls.append(partial(wrapper.run, q, (k, v), out=torch.empty_like(q)))
    return calls


def _stored_values(cache: PagedCache) -> tuple[Tensor, Tensor]:
    """Keys and values [P, HKV, S, D] of a 16-bit cache, where they are."""
    storage = {"fp16": torch.float16, "bf16": torch.bfloat16}[cache.scheme.dtype_name]
    return cache.keys[0].codes.view(storage), cache.values[0].codes.view(storage)


# ---- vLLM

# as vllm/v1/attention/backends/triton_attn.py of 0.33 chooses them on a GPU of compute capability 9.0
VLLM_LAUNCHES = 128  # programs of a decode step from which on it splits no sequence
VLLM_SEGMENTS = 16
# its name of a mode, and how its kernel sees a byte of codes
VLLM_MODES = {
    "int8_per_token_head": ("INT8_PER_TOKEN_HEAD", torch.int8),
    "fp8_per_token_head": ("FP8_PER_TOKEN_HEAD", torch.float8_e4m3fn),
    "int4_per_token_head": ("INT4_PER_TOKEN_HEAD", torch.uint8),
}


def _prepare_vllm(works: Sequence[Work]) -> list[Call]:
    """`unified_attention`, vLLM's Triton kernel, over the same codes and scales in vLLM's own layout.

    Its int4 turns queries and outputs by itself, in launches of their own, which are timed with it.
    """
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # it logs to stdout, which is for results
    import_module("vllm._custom_ops")  # registers the compiled operators, by which its int4 turns queries
    attend: Any = import_module("vllm.v1.attention.ops.triton_unified_attention").unified_attention
    kv_heads = works[0].cache.keys[0].codes.shape[1]
    _, heads, head_dim = works[0].q.shape
    # scratch of splits: the calls run one after another and share it
    rows = max(1, VLLM_LAUNCHES // kv_heads)
    padded = 1 << (head_dim - 1).bit_length()
    output, peak, total = (
        torch.empty(rows, heads, VLLM_SEGMENTS, *width, dtype=torch.float32, device=works[0].q.device)
        for width in ((padded,), (), ())
    )
    calls: list[Call] = []
    for work in works:
        out, batch = torch.empty_like(work.q), work.batch
        call = partial(
            attend,
            q=work.q,
            out=out,
            cu_seqlens_q=batch.query_starts,
            max_seqlen_q=max(end - start for start, end, _ in batch.spans),
            seqused_k=batch.seq_lens,
            max_seqlen_k=max(length for _, _, length in batch.spans),
            softmax_scale=_scaling(work),
            causal=True,
            window_size=(-1, -1),
            block_table=batch.page_table,
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=rows,
            num_par_softmax_segments=VLLM_SEGMENTS,
            softmax_segm_output=output,
            softmax_segm_max=peak,
            softmax_segm_expsum=total,
            **_vllm_cache(work),
        )
        calls.append(partial(_then, call, out))
    return calls


def _then(call: Callable[[], object], out: Tensor) -> Tensor:
    call()
    return out


def _vllm_cache(work: Work) -> dict[str, Any]:
    """Keys and values as vLLM lays them out: a token's heads side by side, of each head K and then V.

    A quantized row ends with its float32 scale.
    """
    cache = work.cache
    name = cache.scheme.dtype_name
    if name not in VLLM_MODES:
        k, v = (x.transpose(1, 2) for x in _stored_values(cache))  # [P, S, HKV, D]
        k, v = torch.cat([k, v], dim=-1).split(k.shape[-1], dim=-1)
        return {"k": k, "v": v}
    mode, seen = VLLM_MODES[name]
    modes: Any = import_module("vllm.v1.kv_cache_interface").KVQuantMode
    planes = (cache.keys[0], cache.values[0])
    stored = torch.cat(
        [
            torch.cat([_exported(plane, part).transpose(1, 2) for plane in planes], dim=-1)
            for part in torch.arange(cache.pages, device=work.q.device).split(EXPORTED_PAGES)
        ]
    )  # [P, S, HKV, 2 * (code bytes + 4)]
    k, v = stored.split(stored.shape[-1] // 2, dim=-1)
    k_codes, k_scale = k.split([k.shape[-1] - 4, 4], dim=-1)
    v_codes, v_scale = v.split([v.shape[-1] - 4, 4], dim=-1)
    return {
        "k": k_codes.view(seen),
        "v": v_codes.view(seen),
        "kv_quant_mode": modes[mode],
        "k_scale_cache": k_scale.view(torch.float32).squeeze(-1),
        "v_scale_cache": v_scale.view(torch.float32).squeeze(-1),
    }


def _exported(plane: Plane, pages: Tensor) -> Tensor:
    assert plane.scale is not None
    rows = plane.rows(pages)
    (rotation,) = plane.side.transforms or (all_rotations()["none"],)
    assert isinstance(rotation, Rotation), "VLLM_SCHEMES has no other"
    return export_rows(rows, plane.dtype, rotation, plane.head_dim)


VLLM_SCHEMES = SIXTEEN_BITS | {
    ("int8_per_token_head", "none"),
    ("fp8_per_token_head", "none"),
    ("int4_per_token_head", "randomized_hadamard"),
}
PEERS = (
    Peer("sdpa-cudnn", SIXTEEN_BITS, partial(_prepare_sdpa, SDPBackend.CUDNN_ATTENTION)),
    Peer("sdpa-flash", SIXTEEN_BITS, partial(_prepare_sdpa, SDPBackend.FLASH_ATTENTION)),
    *(
        Peer(f"flashinfer-{name}", SIXTEEN_BITS, partial(_prepare_flashinfer, name), "flashinfer", "flashinfer-python")
        for name in ("fa2", "fa3")
    ),
    Peer("vllm-triton", VLLM_SCHEMES, _prepare_vllm, "vllm", "vllm"),
)
