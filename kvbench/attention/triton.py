"""Where schemes meet kernels: layouts, roundings, transforms and windows as the data that the launchers take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache, lru_cache
from typing import TypeVar

import torch
from kvbench_kernels import attention, store, store_blocks, unpack
from kvbench_kernels.center import Center
from kvbench_kernels.exact import Exact
from kvbench_kernels.hadamard import Turn
from kvbench_kernels.layout import Layout, Side
from kvbench_kernels.tiers import Rank
from kvbench_kernels.tuning import INTERPRETED
from torch import Tensor

from kvbench.attention.batch import Batch
from kvbench.cache import PagedCache
from kvbench.cache.paged import Plane
from kvbench.dtypes import Affine, Cast, Codebook, Dtype, Tiers
from kvbench.dtypes.base import STEPS
from kvbench.dtypes.int2 import THRESHOLD
from kvbench.schemes import Scheme, Window
from kvbench.schemes import Side as SchemeSide
from kvbench.transforms import Transform
from kvbench.transforms.base import POSITIONS, Lowered, grouped
from kvbench.transforms.center import CenterConstant

T = TypeVar("T")

MULTIPLE = 64  # a head_dim for which to ask whether a transform has a form for kernels

_HALVES = Layout(unpack.FLOAT.value, 16)
WRITTEN = Window(0, 0)  # all rows are written, whatever is read of them

# a dtype states its decoding as data, but its rounding as code: these are the ones that the write kernel repeats
_ROUNDINGS = {
    "auto": store.Rounding(store.ROUND_FLOAT.value),
    "fp16": store.Rounding(store.ROUND_FLOAT.value),
    "bf16": store.Rounding(store.ROUND_FLOAT.value),
    "fp8_per_tensor": store.Rounding(store.ROUND_E4M3.value),
    "fp8_per_token_head": store.Rounding(store.ROUND_E4M3_ROW.value),
    "int8_per_token_head": store.Rounding(store.ROUND_INT8_ROW.value),
    "int4_per_token_head": store.Rounding(store.ROUND_UNSIGNED_ROW.value),
    "int2_per_token_head": store.Rounding(store.ROUND_NORM4_ROW.value, THRESHOLD),
    "midrise2_per_token_head": store.Rounding(store.ROUND_SEARCH_ROW.value, tiers=(22222222, 1.0, 1.0, 1.0, 1.0)),
}
# these are not of any head_dim: codes in two planes
_PLANES = {"int3_per_token_head": store.Rounding(store.ROUND_UNSIGNED_ROW.value)}
# and these lie in blocks: (kind of the codes, format of the scales, rounding)
_BLOCKS = {
    "q8_0": (unpack.SIGNED, unpack.SCALE_F16, store_blocks.BLOCK_Q8),
    "q4_0": (unpack.BLOCK_MIDDLE, unpack.SCALE_F16, store_blocks.BLOCK_Q4),
    "nvfp4": (unpack.BLOCK_E2M1, unpack.SCALE_E4M3, store_blocks.BLOCK_NV4),
    "mxfp4": (unpack.BLOCK_E2M1, unpack.SCALE_E8M0, store_blocks.BLOCK_MX4),
    "mxfp8": (unpack.E4M3, unpack.SCALE_E8M0, store_blocks.BLOCK_MX8),
}


def attend(
    q: Tensor,
    cache: PagedCache,
    layer: int,
    batch: Batch,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    exact: PagedCache | None = None,
    window: Window | None = None,
) -> Tensor:
    """See kvbench.attention.attend."""
    keys, values = cache.keys[layer], cache.values[layer]
    k, v = (_decoded(cache, x) if _copied(x) else side(x) for x in (keys, values))
    dtype, shifted = q.dtype, shift(keys)
    if shifted is not None:
        q = q * grouped(shifted.reciprocal().to(dtype), q.shape[1])  # powers of two: exact
    if _copied(keys) and turned_apart(keys.side):
        # what a centre adds to scores is large, and 11 bits of a turned query lose less of it than 8
        turned = keys.side.query(q.float(), keys.params)
        q = turned.to(torch.float16 if _centred(keys.side) else dtype)
    out: Tensor = attention.attend(
        q,
        k,
        v,
        batch.page_table,
        batch.seq_lens,
        batch.query_starts,
        scale=scaling,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        sinks=None if sinks is None else sinks.to(torch.float32),
        k_turn=_turn(keys),
        v_turn=_turn(values),
        exact=None if exact is None or window is None else _exact(exact, layer, window),
        center=center(keys),
        rank=rank(keys),
    )
    if _copied(values) and turned_apart(values.side):
        out = values.side.undo(out.float(), values.params).to(dtype)
    elif any(values.params[: len(values.side.transforms)]):  # they are centred, which the kernels don't undo
        lowered = values.side.lower(values.head_dim, values.params)
        assert lowered is not None, "`lacking` refuses it"
        assert lowered.offset is not None, "nothing else learns of values"
        out = (out.to(torch.float32) + grouped(lowered.offset, out.shape[1])).to(dtype)
    return out.to(dtype)


@cache
def in_copy(dtype: Dtype) -> bool:
    """Whether the kernels read its rows in a copy of 16 bits, having no code for it: it is decoded as it is written."""
    try:
        layout(dtype), rounding(dtype)
    except ValueError:
        return not dtype.page_tokens
    return False


@cache
def turned_apart(side: SchemeSide) -> bool:
    """Whether queries and outputs are turned by torch: no kernel has the rotation, and the rows are read in a copy.

    A centre that comes first is turned too, once, and the kernels add what it takes from the scores.
    """
    keep = all(one.keeps_scores for one in side.transforms[_centred(side) :])
    return in_copy(side.dtype) and keep and side.lower(MULTIPLE) is None


def _centred(side: SchemeSide) -> bool:
    """Whether the first of its transforms is a centre."""
    return isinstance(next(iter(side.transforms), None), CenterConstant)


def writes(side: SchemeSide) -> bool:
    """Whether the kernels write a side's rows, and not the definitions."""
    return not in_copy(side.dtype) and side.lower(MULTIPLE) is not None


def flows(side: SchemeSide) -> bool:
    """Whether the definition writes a side's rows without a look at what the device computed: all but whole pages'."""
    return not side.dtype.page_tokens and (turned_apart(side) or side.lower(MULTIPLE) is not None)


def _copied(plane: Plane) -> bool:
    """`in_copy` of a plane's dtype, found without a hash of all that it is."""
    if "copied" not in plane.launched:
        plane.launched["copied"] = in_copy(plane.dtype)
    found: bool = plane.launched["copied"]
    return found


def _decoded(cache: PagedCache, plane: Plane) -> Side:
    """A plane's rows as they were decoded when they were written."""
    made: Side | None = plane.launched.get("decoded")
    if made is None:
        cache.keep_decoded([plane.side.dtype])
        assert plane.decoded is not None
        made = plane.launched["decoded"] = Side(plane.decoded, None, _HALVES)
    return made


def append(
    cache: PagedCache,
    layer: int,
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    positions: Tensor | None = None,
    exact: PagedCache | None = None,
) -> None:
    """What `PagedCache.append` does to both caches, in one launch: the same bytes.

    Raises:
        ValueError: a dtype whose rounding no kernel repeats.
    """
    if cache.destroyed:
        k, v = torch.zeros_like(k), torch.zeros_like(v)
    keys, values = cache.keys[layer], cache.values[layer]
    shifted = shift(keys)
    if shifted is not None:
        k = k * shifted.to(k.dtype)
    store.store(
        k,
        v,
        side(keys),
        side(values),
        rounding(keys.dtype),
        rounding(values.dtype),
        slot_mapping,
        k_turn=_turn(keys),
        v_turn=_turn(values),
        center=center(keys),
        rank=rank(keys),
        positions=positions,
        exact=None if exact is None else _exact(exact, layer, WRITTEN),
    )


def lacking(
    scheme: Scheme,
    compute_dtype: torch.dtype,
    device: torch.device,
    head_dims: Collection[int] = (),
    copies: bool = False,
) -> str:
    """Why the kernels can't serve this resolved scheme with queries of this dtype; empty where they can.

    head_dims: of the layers, where they are known. copies: rows may be read in a copy of 16 bits, which is no speed.
    """
    if device.type != "cuda" and not INTERPRETED:
        return "there is no GPU here, and Triton interprets kernels under TRITON_INTERPRET=1 alone"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "the kernels use instructions of compute capability 9.0 (Hopper), which this GPU does not have"
    if compute_dtype not in (torch.float16, torch.bfloat16):
        return f"the kernels multiply in 16 bits, and the model computes in {str(compute_dtype).removeprefix('torch.')}"
    try:
        for dtype in scheme.dtypes:
            if copies and in_copy(dtype):
                continue
            words = layout(dtype)
            rounding(dtype)
            for head_dim in head_dims:
                try:
                    words.words(head_dim), words.rest_words(head_dim)
                except ValueError as error:
                    return f"no kernel reads {dtype.name} of head_dim {head_dim}; the reference does ({error})"
        for side in scheme.all_sides:
            if not turned_apart(side):
                turn(side, MULTIPLE, device)
        for value in (scheme.value, *(layer.value for layer in scheme.layers)):
            if value is not None and value.learns and not in_copy(value.dtype):
                raise ValueError(f"no kernel centres values as {value.dtype.name}; the reference does")
            if value is not None and isinstance(value.dtype.decode, Tiers):
                raise ValueError(f"no kernel reads values as {value.dtype.name}, which is for keys; the reference does")
        own = [(one.key or scheme.key, one.value or scheme.value) for one in scheme.layers]
        for key, value in ((scheme.key, scheme.value), *own):
            a, b = (_HALVES if in_copy(side.dtype) else layout(side.dtype) for side in (key, value))
            if a.in_blocks != b.in_blocks or (a.block > 0) != (b.block > 0):
                raise ValueError(f"no kernel reads {key.dtype.name} beside {value.dtype.name}; the reference does")
    except ValueError as error:
        return str(error)
    return ""


def side(plane: Plane) -> Side:
    """The launchers' view of one plane of a cache."""
    made: Side | None = plane.launched.get("side")
    if made is None:
        storage = plane.dtype.decode.storage if isinstance(plane.dtype.decode, Cast) else None
        scale = plane.scale if plane.scale is not None else plane.tensor_scale
        words = layout(plane.dtype)
        whole = plane.tensor_scale if words.block else None
        made = Side(plane.codes, scale, words, storage or torch.float16, plane.rest, whole)
        plane.launched["side"] = made
    return made


def _turn(plane: Plane) -> Turn:
    """`turn` of a plane's side, found without a hash of all that the side is."""
    made: Turn | None = plane.launched.get("turn")
    if made is None:
        apart = turned_apart(plane.side)
        made = Turn() if apart else turn(plane.side, plane.head_dim, plane.codes.device)
        plane.launched["turn"] = made
    return made


def layout(dtype: Dtype) -> Layout:
    """How the kernels read rows of this dtype.

    Raises:
        ValueError: no kernel decodes it.
    """
    decode = dtype.decode
    if dtype.page_tokens:
        raise ValueError(f"no kernel quantizes or decodes pages as a whole, as {dtype.name} is")
    if dtype.name in _BLOCKS:
        kind, scales, _ = _BLOCKS[dtype.name]
        return Layout(kind.value, dtype.code_bits, block=dtype.group_size, scales=scales.value)
    if dtype.granularity == "per_group":
        raise ValueError(f"no kernel decodes {dtype.name}, which has a scale every {dtype.group_size} channels")
    if isinstance(decode, Cast) and decode.storage in (torch.float16, torch.bfloat16):
        return Layout(unpack.FLOAT.value, 16)
    if isinstance(decode, Cast) and decode.storage == torch.float8_e4m3fn:
        return Layout(unpack.E4M3.value, 8)
    if decode == Affine("none") and dtype.code_bits == 8:
        return Layout(unpack.SIGNED.value, 8)
    if dtype.name in _PLANES:
        return Layout(unpack.THREE.value, 3, scales=unpack.SCALE_ROW.value)
    if isinstance(decode, Tiers):
        return Layout(unpack.TIERS.value, 2, _tiers(decode.widths))
    if dtype.code_bits < 8 and dtype.word_bits == 16 and len(dtype.planes) == 1:
        if decode == Affine("in_scale"):
            return Layout(unpack.UNSIGNED.value, dtype.code_bits)
        if isinstance(decode, Codebook):
            return Layout.of_codebook(decode.centroids)
    raise ValueError(f"no kernel decodes {dtype.name}; the reference does")


def rounding(dtype: Dtype) -> store.Rounding:
    """How the write kernel rounds to this dtype.

    Raises:
        ValueError: it does not.
    """
    if isinstance(dtype.decode, Tiers):
        return store.Rounding(store.ROUND_SEARCH_ROW.value, tiers=_tiers(dtype.decode.widths))
    if dtype.name in _BLOCKS:
        return store.Rounding(_BLOCKS[dtype.name][2].value)
    if found := (_ROUNDINGS | _PLANES).get(dtype.name):
        return found
    raise ValueError(f"no kernel rounds to {dtype.name}: append through PagedCache.append")


def _tiers(widths: tuple[int, ...], steps: Mapping[int, float] = STEPS) -> tuple[float, ...]:
    """Widths and steps as kernels take them."""
    return int("".join(map(str, widths))), *(steps[bits] for bits in (1, 2, 3, 4))


@lru_cache(maxsize=64)
def turn(side: SchemeSide | Transform, head_dim: int, device: torch.device) -> Turn:
    """How a side's transforms, or one of them, turn rows; what they subtract before is `center`'s.

    Raises:
        ValueError: they are more than an offset, signs and a Hadamard matrix.
    """
    lowered = side.lower(head_dim)
    if lowered is None:
        raise ValueError(f"no kernel computes {side.name}; the reference does")
    return Turn(lowered.block, lowered.exponent, None if lowered.signs is None else lowered.signs.to(device))


def center(keys: Plane) -> Center | None:
    """What the transforms subtract from a layer's keys, as they learned it; None where that is nothing."""

    def made(lowered: Lowered) -> Center | None:
        if turned_apart(keys.side):
            return _turned_center(keys) if _centred(keys.side) else None
        if lowered.offset is None:
            return None
        device = keys.codes.device
        offset, shifted = lowered.offset.to(device), shift(keys)
        offset = offset if shifted is None else offset * shifted
        by_page = offset if offset.dim() == 3 else offset[None]
        return Center.make(by_page, turn(keys.side, keys.head_dim, device), POSITIONS, rank(keys))

    return _of_keys(keys, "center", made)


def _turned_center(keys: Plane) -> Center:
    """A layer's centre as queries see it that torch has turned."""
    first, *others = zip(keys.side.transforms, keys.params, strict=False)
    offset = first[1]["offset"].to(torch.float64)  # [pages or 1, HKV, D]
    for transform, known in others:
        offset = transform.apply(offset, known, None)
    return Center.make(offset.to(keys.codes.device), None, POSITIONS)


def shift(keys: Plane) -> Tensor | None:
    """[HKV, D] float32, the powers of two that the transforms multiply a layer's key channels with; None for ones."""
    device = keys.codes.device
    return _of_keys(keys, "shift", lambda lowered: None if lowered.shift is None else lowered.shift.to(device))


def rank(keys: Plane) -> Rank | None:
    """How the transforms sort a layer's key channels, as they learned it; None where they do not."""

    def made(lowered: Lowered) -> Rank | None:
        if lowered.order is None or lowered.spread is None:
            return None
        return Rank.make(lowered.order.to(keys.codes.device), lowered.spread.to(keys.codes.device))

    return _of_keys(keys, "rank", made)


def _of_keys(keys: Plane, name: str, make: Callable[[Lowered], T | None]) -> T | None:
    """What is made once of what a layer's key transforms learned; None where that is nothing.

    make: of their form for kernels, which is empty where torch turns queries and outputs.
    """
    if not any(keys.params):
        return None
    if name not in keys.launched:
        lowered = Lowered() if turned_apart(keys.side) else keys.side.lower(keys.head_dim, keys.params)
        assert lowered is not None, "`turn` refuses it"
        keys.launched[name] = make(lowered)
    found: T | None = keys.launched[name]
    return found


def _exact(cache: PagedCache, layer: int, window: Window) -> Exact:
    """A layer's rows in 16 bits, and which of them are read."""
    k, v = side(cache.keys[layer]).words, side(cache.values[layer]).words
    return Exact(k, v, window.sinks, window.recent, window.page)
