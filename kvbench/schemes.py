"""A scheme: how a model's keys and values are stored, with its name and the parser of that name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch

from kvbench.dtypes import Dtype, all_dtypes
from kvbench.registry import find_name
from kvbench.transforms import Rotation, all_rotations

Pair = str | Mapping[str, str]  # one name for both, "key:value", or {"key": …, "value": …}


@dataclass(frozen=True)
class Scheme:
    """A dtype and a rotation for keys, and the same for values."""

    key: Dtype
    value: Dtype
    key_rotation: Rotation
    value_rotation: Rotation

    @classmethod
    def parse(cls, dtype: Pair, rotation: Pair | None = None) -> Self:
        """The scheme of these names; without a rotation, each dtype's default.

        Raises:
            ValueError: an unknown name.
        """
        key, value = (all_dtypes()[find_name(name, all_dtypes(), "dtype")] for name in split_pair(dtype))
        if rotation is None or rotation == "default":
            rotations = [key.default_rotation, value.default_rotation]
        else:
            rotations = [find_name(name, all_rotations(), "rotation") for name in split_pair(rotation)]
        return cls(key, value, all_rotations()[rotations[0]], all_rotations()[rotations[1]])

    @property
    def dtype_name(self) -> str:
        """`int4_per_token_head`, or `int4_per_token_head:int2_per_token_head` where keys and values differ."""
        return join_pair(self.key.name, self.value.name)

    @property
    def rotation_name(self) -> str:
        """`hadamard`, or `randomized_hadamard:hadamard` where keys and values differ."""
        return join_pair(self.key_rotation.name, self.value_rotation.name)

    def resolve(self, model_dtype: torch.dtype) -> Self:
        """This scheme with `auto` replaced by the model's own dtype."""
        return type(self)(
            self.key.resolve(model_dtype), self.value.resolve(model_dtype), self.key_rotation, self.value_rotation
        )

    def bits_per_value(self, head_dim: int) -> float:
        """True bits a value, the mean over keys and values."""
        return (self.key.bits_per_value(head_dim) + self.value.bits_per_value(head_dim)) / 2

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of K and V together for one token and one head."""
        return self.key.row_bytes(head_dim) + self.value.row_bytes(head_dim)


def split_pair(pair: Pair) -> tuple[str, str]:
    """The names for keys and for values.

    Raises:
        ValueError: a mapping without exactly the keys `key` and `value`, or more than one colon.
    """
    if isinstance(pair, Mapping):
        if set(pair) != {"key", "value"}:
            raise ValueError(f"a pair has the keys 'key' and 'value', not {', '.join(map(repr, pair))}")
        return pair["key"], pair["value"]
    parts = pair.split(":")
    if len(parts) > 2:
        raise ValueError(f"'{pair}' has more than one colon: write KEY:VALUE")
    return parts[0], parts[-1]


def join_pair(key: str, value: str) -> str:
    """One name where both are the same, else `key:value`."""
    return key if key == value else f"{key}:{value}"
