"""What a kernel must know of the bytes it reads: plain data, handed over by whoever owns the cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvbench_kernels import unpack
from kvbench_kernels.tiers import rest_words
from kvbench_kernels.whole import whole_values


@dataclass(frozen=True)
class Layout:
    """How one row of keys or values is stored.

    kind: one of the constants of `unpack`.
    bits: bits of one code: 16 (FLOAT), 8 (E4M3, SIGNED), 4 or 2. Codes under 8 bits are packed into 16-bit words: word
        j of W holds the codes of channels j, j+W, j+2W, ... from its low bits up.
    codebook: SYMMETRIC4 and TABLE: the value of each code, rising. TIERS: as tiers.py says; bits are 2, as a row has
        as many words.
    block: channels that share a scale; 0 where a row has one at most.
    scales: the format of a block's scale, one of the constants of `unpack`.
    """

    kind: int
    bits: int
    codebook: tuple[float, ...] = ()
    block: int = 0
    scales: int = 0

    def __post_init__(self) -> None:
        allowed = {
            unpack.FLOAT.value: (16,),
            unpack.E4M3.value: (8,),
            unpack.SIGNED.value: (8,),
            unpack.UNSIGNED.value: (2, 4),
            unpack.SYMMETRIC4.value: (2,),
            unpack.TABLE.value: (1, 2, 4),
            unpack.TIERS.value: (2,),
            unpack.BLOCK_E2M1.value: (4,),
            unpack.BLOCK_MIDDLE.value: (4,),
            unpack.THREE.value: (3,),
        }
        if self.bits not in allowed.get(self.kind, ()):
            raise ValueError(
                f"no kernel decodes kind {self.kind} at {self.bits} bits; it needs {allowed.get(self.kind)}"
            )
        if self.kind in (unpack.SYMMETRIC4.value, unpack.TABLE.value) and len(self.codebook) != 1 << self.bits:
            raise ValueError(f"a codebook of {self.bits} bits has {1 << self.bits} values, not {len(self.codebook)}")

    @classmethod
    def of_codebook(cls, values: tuple[float, ...]) -> Layout:
        """The layout of a codebook dtype: SYMMETRIC4 where the values allow it."""
        bits = (len(values) - 1).bit_length()
        return cls((unpack.SYMMETRIC4 if whole_values(values) else unpack.TABLE).value, bits, values)

    @property
    def in_blocks(self) -> bool:
        """Whether blocks.py reads it."""
        return self.block > 0 or self.kind == unpack.THREE.value

    def words(self, head_dim: int) -> int:
        """16-bit words of a row's codes."""
        if self.kind == unpack.THREE.value and (head_dim < 32 or head_dim & (head_dim - 1)):
            raise ValueError(f"kernels read codes of 3 bits in rows of 32, 64, 128, 256, ... channels, not {head_dim}")
        if head_dim * self.bits % 16:
            raise ValueError(f"head_dim {head_dim} does not fill 16-bit words at {self.bits} bits")
        words = head_dim * self.bits // 16
        # what one product takes is of one block, and sixteen words at least
        if self.block and math.gcd(words, self.block * self.bits // 16 if self.bits == 8 else self.block) < 16:
            raise ValueError(
                f"head_dim {head_dim} has too short streams of blocks; kernels read 64, 128, 192, 256, ..."
            )
        return words

    def rest_words(self, head_dim: int) -> int:
        """16-bit words that follow them, in a piece of memory of their own: TIERS alone has such."""
        return rest_words(int(self.codebook[0]), head_dim) if self.kind == unpack.TIERS.value else 0

    @property
    def unit(self) -> float:
        """SYMMETRIC4: the distance of the lower two values, which the streams count in. Otherwise 1."""
        return self.codebook[1] - self.codebook[0] if self.kind == unpack.SYMMETRIC4.value else 1.0

    @property
    def step(self) -> float:
        """SYMMETRIC4: how far the inner two values lie farther apart than half a unit each, in units. Otherwise 0.

        An fp16 number, as codes are multiplied with one: a centre of more digits would not be that of the values.
        """
        if self.kind != unpack.SYMMETRIC4.value:
            return 0.0
        return float(torch.tensor(1.5 + self.codebook[0] / self.unit, dtype=torch.float16))


@dataclass(frozen=True)
class Side:
    """The keys or the values of one layer.

    codes: [P, HKV, S, code_bytes] uint8, contiguous; FLOAT: also [P, HKV, S, D] of the 16-bit type itself.
    scale: [P, HKV, S] float32, one a row, or uint8 as `row_scale` has it; or one float32 of no dimension for all; or
        None.
        Of blocks: [P, HKV, S, blocks] of the scales' own type, contiguous.
    rest: [P, HKV, S, bytes] uint8, contiguous, the words that follow a row's words; or None.
    tensor_scale: one float32 that multiplies all scales of blocks; or None.
    """

    codes: Tensor
    scale: Tensor | None
    layout: Layout
    storage: torch.dtype = torch.float16  # FLOAT: which 16-bit type the bytes are
    rest: Tensor | None = None
    tensor_scale: Tensor | None = None

    @cached_property
    def words(self) -> Tensor:
        """The codes as int16 words, or as the 16-bit floats they are."""
        return self.codes.view(self.storage if self.layout.kind == unpack.FLOAT.value else torch.int16)

    @cached_property
    def following(self) -> Tensor | None:
        """The words that follow, as int16."""
        return None if self.rest is None else self.rest.view(torch.int16)

    @property
    def scale_dims(self) -> int:
        """1: a scale each row. 0: one for all. -1: none."""
        return -1 if self.scale is None else min(self.scale.dim(), 1)

    @cached_property
    def scale_fours(self) -> Tensor | None:
        """Scales of 8 bits as [P, HKV, S / 4] int32, others as they are."""
        scale = self.scale
        return scale if scale is None or scale.dtype != torch.uint8 else scale.view(torch.int32)

    @property
    def scale_words(self) -> Tensor:
        """[P, HKV, S, N]: a row's blocks' scales, as the largest integers that they fill."""
        assert self.scale is not None, "`check` refuses it"
        if not self.layout.block:
            return self.scale.view(torch.int32).unsqueeze(-1)
        size = self.scale.shape[-1] * self.scale.element_size()
        widest = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        return self.scale.view(widest[min(8, size & -size)])

    @property
    def block_constants(self) -> tuple[int, ...]:
        """The constants KIND, BITS, BLOCK, SCALES and SCALE_WORDS of blocks.py."""
        layout = self.layout
        head_dim = self.codes.shape[-1] * 8 // layout.bits
        return layout.kind, layout.bits, layout.block or head_dim, layout.scales, self.scale_words.shape[-1]

    @cached_property
    def constants(self) -> tuple[object, ...]:
        """The kernels' constants KIND, BITS, CODEBOOK, UNIT, STEP and SCALE of this side."""
        layout = self.layout
        return layout.kind, layout.bits, layout.codebook, layout.unit, layout.step, self.scale_dims


def check(q: Tensor, k: Side, v: Side) -> None:
    """Raises ValueError where these tensors do not fit together."""
    query_heads, head_dim = q.shape[-2:]
    for name, side in (("k", k), ("v", v)):
        shape = side.codes.shape
        if not side.codes.is_contiguous():
            raise ValueError(f"{name}.codes is not contiguous; pass the whole cache, not a view of it")
        if side.words.shape[-1] != side.layout.words(head_dim) or len(shape) != 4:
            raise ValueError(f"{name}.codes is {list(shape)}, not [P, HKV, S, {2 * side.layout.words(head_dim)} bytes]")
        if side.scale_dims == 1 and side.scale is not None:
            want = [*shape[:3], *([head_dim // side.layout.block] if side.layout.block else [])]
            if list(side.scale.shape) != want:
                raise ValueError(f"{name}.scale is {list(side.scale.shape)}, not {want}")
        rest = side.layout.rest_words(head_dim)
        found = None if side.rest is None else list(side.rest.shape)
        if found != ([*shape[:3], 2 * rest] if rest else None):
            raise ValueError(f"{name}.rest is {found}, not the {2 * rest} bytes a row that follow its words")
        if side.layout.kind in (unpack.UNSIGNED.value, unpack.THREE.value) and side.scale_dims != 1:
            raise ValueError(f"{name}: unsigned codes hide their zero-point in a scale a row, which is missing")
    if v.layout.kind == unpack.TIERS.value:
        raise ValueError("no kernel reads values in tiers, which are for keys")
    if k.layout.in_blocks != v.layout.in_blocks:
        raise ValueError("no kernel reads keys with a scale a block beside values without, or the other way round")
    if k.codes.shape[:3] != v.codes.shape[:3]:
        raise ValueError(f"k and v differ in pages, heads or page size: {list(k.codes.shape)}, {list(v.codes.shape)}")
    if query_heads % k.codes.shape[1]:
        raise ValueError(f"{query_heads} query heads are no multiple of {k.codes.shape[1]} KV heads")
