"""A scheme: how a model's keys and values are stored, with its name, its parser, its identity and its bytes.

In one text, `int4:int2+w64s4+l0=int8` and beside it the transforms, `center+hadamard:hadamard`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import torch
from torch import Tensor

from kvbench.calibration import Calibration
from kvbench.dtypes import Dtype, all_dtypes
from kvbench.presets import all_presets
from kvbench.registry import find_name
from kvbench.transforms import Lowered, Params, Sample, Transform, all_transforms
from kvbench.transforms.base import POSITIONS

Pair = str | Mapping[str, Any]  # one name for both, "key:value", or {"key": …, "value": …}
Layers = Sequence[tuple[int, int]]  # (KV heads, head_dim) of each
SAME = "-"  # in a layer's dtypes: as in the other layers
MOST_LABELS = 4  # layers that a name spells out
PAGES = (64, 128)  # tokens of a window's page, where no dtype says
SPEC = ("dtype", "key", "value", "rotation", "rotations", "window", "layers", "calibration", "scheme")


@dataclass(frozen=True)
class Side:
    """How keys, or values, are stored: what prepares a row, in this order, and what it becomes.

    The maps take what each transform learned of a layer, in the same order; what the dtype learned follows.
    """

    dtype: Dtype
    transforms: tuple[Transform, ...] = ()

    @classmethod
    def of(cls, dtype: Dtype, names: str) -> Self:
        """The side with these transforms, `center+hadamard`; `none` is none.

        Raises:
            ValueError: an unknown name.
        """
        found = [find_name(name, all_transforms(), "rotation") for name in names.split("+")]
        return cls(dtype, tuple(all_transforms()[name] for name in found if name != "none"))

    @property
    def name(self) -> str:
        """The transforms' names, `center+hadamard`, or `none`."""
        return "+".join(transform.name for transform in self.transforms) or "none"

    @property
    def learns(self) -> bool:
        """Whether it needs a calibration text."""
        return self.dtype.learns or any(transform.learns for transform in self.transforms)

    @property
    def reads_queries(self) -> bool:
        """Whether it learns from queries too."""
        return self.dtype.reads_queries or any(transform.reads_queries for transform in self.transforms)

    @property
    def unlearned(self) -> tuple[Params, ...]:
        """What it knows that learned nothing: a place for each transform, and one for a dtype that learns."""
        return ({},) * (len(self.transforms) + self.dtype.learns)

    @property
    def lesson(self) -> str:
        """What decides what it learns of a text: its transforms, and its dtype where that, or how it reads, counts."""
        counts = self.dtype.learns or any(transform.reads_stored for transform in self.transforms)
        return f"{self.name} of {self.dtype.name}" if counts else self.name

    def resolve(self, model_dtype: torch.dtype) -> Self:
        """This side with `auto` replaced by the model's own dtype."""
        return replace(self, dtype=self.dtype.resolve(model_dtype))

    def learn(self, sample: Sample) -> tuple[Params, ...]:
        """What each transform learns of a layer, and the dtype, from the sample as the transforms before it left it."""
        found: list[Params] = []
        given, dtype = sample, self.dtype.resolve(torch.float32)
        sample = replace(sample, stored=dtype.stored)
        for transform in self.transforms:
            params = transform.learn(sample)
            found.append(params)
            if self.dtype.learns or any(later.learns for later in self.transforms[len(found) :]):
                keys = transform.apply(sample.keys, params, sample.positions)
                queries = None if sample.queries is None else transform.query(sample.queries, params)
                sample = replace(sample, keys=keys, queries=queries, rope=sample.rope if transform.turns else None)
        if not self.dtype.learns:
            return tuple(found)
        if self.dtype.reads_anywhere and given.rope is not None:
            assert given.queries is not None, "it reads queries"
            sample = replace(sample, queries=self.query(given.anywhere(given.queries), found))
        return (*found, self.dtype.learn(sample))

    def apply(self, x: Tensor, params: Sequence[Params] = (), positions: Tensor | None = None) -> Tensor:
        """[T, H, D] rows as the dtype takes them, of tokens at these positions [T]."""
        for transform, known in self._with(params):
            x = transform.apply(x, known, positions)
        return x

    def query(self, q: Tensor, params: Sequence[Params] = ()) -> Tensor:
        """[T, HQ, D] queries for such keys."""
        for transform, known in self._with(params):
            q = transform.query(q, known)
        return q

    def score(self, q: Tensor, params: Sequence[Params] = ()) -> Tensor | None:
        """[T, HQ, P], what query(q)·apply(k) lacks of q·k, for keys by page of positions; P = 1 where all are alike."""
        total = None
        for transform, known in self._with(params):
            own = transform.score(q, known)
            if own is not None:
                total = own if total is None else total + own
            q = transform.query(q, known)
        return total

    def lift(self, q: Tensor, params: Sequence[Params] = ()) -> Tensor | None:
        """[T, HQ] of transformed queries: what a stored key's score gets, over the square of its length."""
        own = [transform.lift(q, known) for transform, known in self._with(params)]
        found = [one for one in own if one is not None]
        return sum(found[1:], found[0]) if found else None

    def undo(self, o: Tensor, params: Sequence[Params] = ()) -> Tensor:
        """[T, HQ, D] outputs as untransformed values would give them."""
        for transform, known in reversed(self._with(params)):
            o = transform.undo(o, known)
        return o

    def lower(self, head_dim: int, params: Sequence[Params] = ()) -> Lowered | None:
        """All transforms as kernels take them at once; None where they can't."""
        whole: Lowered | None = Lowered()
        for transform, known in self._with(params):
            one = transform.lower(head_dim, known)
            whole = None if whole is None or one is None else whole.then(one)
        return whole

    def _with(self, params: Sequence[Params]) -> list[tuple[Transform, Params]]:
        return list(zip(self.transforms, (params or self.unlearned)[: len(self.transforms)], strict=True))


@dataclass(frozen=True)
class Window:
    """Which keys a query reads in 16 bits: the first `sinks` tokens, and those near it.

    recent: whole pages of `page` positions before the query's own, which is read in 16 bits too; None for sinks alone.
    """

    sinks: int = 0
    recent: int | None = None
    page: int = POSITIONS

    @classmethod
    def of(cls, value: Any, page: int = 0) -> Self:
        """The window of a mapping with `sinks`, `recent` and `page`, any of which may be left out.

        page: of the dtypes that quantize pages; 0 where none does.

        Raises:
            ValueError: another key, no whole number, or a page that is not the dtypes'.
        """
        if not isinstance(value, Mapping) or not value or set(value) - {"sinks", "recent", "page"}:
            raise ValueError(
                f"window: expected a mapping with 'sinks' (tokens), 'recent' (pages) and 'page' (tokens), not {value!r}"
            )
        for name, count in value.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"window: {name} is a whole number from 0 on, not {count!r}")
        if "page" in value and value["page"] not in ((page,) if page else PAGES):
            expected = f"{page} tokens, as the scheme's dtypes have it" if page else "64 or 128 tokens"
            raise ValueError(f"window: a page has {expected}, not {value['page']}")
        if not value.get("sinks") and "recent" not in value:
            raise ValueError("window: no sinks and no recent pages leave nothing in 16 bits: leave it out")
        return cls(**({"page": page} if page else {}) | dict(value))

    def label(self, page: int = 0) -> str:
        """`w64s4`: recent tokens, and sinks; `w128s4p128` where a page is neither the dtypes' nor of 64 tokens."""
        near = "" if self.recent is None else f"w{self.recent * self.page}"
        label = f"{near}s{self.sinks}" if self.sinks or not near else near
        return label if self.page == (page or POSITIONS) else f"{label}p{self.page}"

    def starts(self, positions: Tensor) -> Tensor:
        """[T] the first of the recent keys that queries at these positions [T] read in 16 bits."""
        if self.recent is None:
            return positions + 1
        return ((positions // self.page - self.recent) * self.page).clamp_min(0)

    def tokens(self, length: int) -> int:
        """Tokens that a sequence of this length keeps in 16 bits: a ring of pages, and the sinks."""
        return min(length, self.sinks + (0 if self.recent is None else (self.recent + 1) * self.page))


@dataclass(frozen=True)
class Override:
    """How one layer stores its keys, and its values; a negative index counts from the last. None: as the others do."""

    index: int
    key: Side | None
    value: Side | None

    def label(self, key: Side, value: Side) -> str:
        """`l0=int8_per_token_head`, `l-1=int4_per_token_head:-`; in parentheses transforms other than these sides'."""

        def named(own: Side | None, other: Side) -> str:
            if own is None:
                return SAME
            turned = "" if own.transforms == other.transforms else f"({own.name})"
            return f"{own.dtype.name}{turned}"

        return f"l{self.index}=" + join_pair(named(self.key, key), named(self.value, value))

    def resolve(self, model_dtype: torch.dtype) -> Self:
        """With `auto` replaced by the model's own dtype."""
        return replace(
            self, key=self.key and self.key.resolve(model_dtype), value=self.value and self.value.resolve(model_dtype)
        )


@dataclass(frozen=True)
class Scheme:
    """How keys and values are stored. layers: what other layers have. calibration: where a transform learns."""

    key: Side
    value: Side
    window: Window | None = None
    layers: tuple[Override, ...] = ()
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        for value in (self.value, *(layer.value for layer in self.layers if layer.value)):
            for transform in value.transforms:
                if transform.keys_only:
                    raise ValueError(
                        f"'{transform.name}' on values can't be undone: it is for keys alone; write KEY:VALUE, "
                        f"such as {self.key.name}:none"
                    )
        if self.calibration is None and self.learns:
            object.__setattr__(self, "calibration", Calibration())
        if page := self.page_tokens:
            # what is not yet a whole page is in 16 bits
            window = self.window or Window(0, 0, page)
            object.__setattr__(self, "window", replace(window, recent=window.recent or 0, page=page))

    # ---- reading

    @classmethod
    def parse(cls, dtype: Pair, rotation: Pair | None = None) -> Self:
        """The scheme of these names; without a rotation, each dtype's default, or what the preset says.

        Raises:
            ValueError: an unknown name.
        """
        extras: list[str] = []
        if isinstance(dtype, str):
            dtype, *extras = dtype.split("+")
        if isinstance(dtype, str) and (preset := find_preset(dtype)):
            if rotation not in (None, "default"):
                raise ValueError(f"scheme '{dtype}' has transforms of its own: leave the rotation out, or name a dtype")
            scheme = cls.of(all_presets()[preset].spec)
        else:
            others = all_presets() if isinstance(dtype, str) and ":" not in dtype else ()
            key, value = (find_dtype(name, others) for name in split_pair(dtype))
            if rotation is None or rotation == "default":
                names = [key.default_rotation, value.default_rotation]
            else:
                names = [name if isinstance(name, str) else "+".join(name) for name in split_pair(rotation)]
            scheme = cls(Side.of(key, names[0]), Side.of(value, names[1]))
        for extra in extras:
            scheme = scheme._with_label(extra)
        return scheme

    @classmethod
    def of(cls, spec: Any) -> Self:
        """The scheme of a text, or of a mapping as a preset or the YAML's `schemes` has it.

        Raises:
            ValueError: an unknown key or name.
        """
        if isinstance(spec, str):
            return cls.parse(spec)
        if not isinstance(spec, Mapping) or not spec:
            raise ValueError(f"expected a scheme's name or a mapping, not {spec!r}")
        for name in spec:
            if name not in SPEC:
                raise ValueError(f"unknown key '{name}' of a scheme: one of {', '.join(SPEC)}")
        rotation = spec.get("rotation", spec.get("rotations"))
        sides = {name: spec[name] for name in ("key", "value") if name in spec}
        if ("dtype" in spec) + ("scheme" in spec) + bool(sides) != 1:
            raise ValueError("a scheme has either 'dtype', 'key' and 'value', or 'scheme' (another one's name)")
        scheme = cls.parse(spec.get("dtype") or spec.get("scheme") or sides, rotation)
        if "window" in spec:
            scheme = replace(scheme, window=Window.of(spec["window"], scheme.page_tokens))
        if "layers" in spec:
            scheme = replace(scheme, layers=_overrides(spec["layers"], scheme))
        return scheme.calibrated(Calibration.of(spec["calibration"])) if "calibration" in spec else scheme

    def _with_label(self, label: str) -> Self:
        if label and (match := re.fullmatch(r"(?:w(\d+))?(?:s(\d+))?(?:p(\d+))?", label)):
            recent, sinks, page = (None if group is None else int(group) for group in match.groups())
            size = page or self.page_tokens or POSITIONS
            if (recent or 0) % size == 0 and (recent, sinks) != (None, None):
                given = {"sinks": sinks, "recent": None if recent is None else recent // size, "page": page}
                spec = {name: value for name, value in given.items() if value is not None}
                return replace(self, window=Window.of(spec, self.page_tokens))
        if match := re.fullmatch(r"l(-?\d+)=(.+)", label):
            return replace(self, layers=(*self.layers, *_overrides({match[1]: match[2]}, self)))
        raise ValueError(
            f"'+{label}' of a scheme's name is no window, such as +w64s4 "
            f"(w in steps of {self.page_tokens or POSITIONS}), and no layer, such as +l0=int8"
        )

    def calibrated(self, calibration: Calibration) -> Self:
        """This scheme learning from another text; itself where it learns nothing."""
        return replace(self, calibration=calibration) if self.learns else self

    def spec(self) -> dict[str, Any]:
        """The mapping that `of` makes it of, as a YAML has it; layers that are alike stand together."""
        row: dict[str, Any] = {
            "dtype": {"key": self.key.dtype.name, "value": self.value.dtype.name},
            "rotation": {"key": self.key.name, "value": self.value.name},
        }
        if self.window is not None:
            row["window"] = {name: value for name, value in asdict(self.window).items() if value is not None}
        alike: dict[tuple[Side | None, Side | None], list[int]] = {}
        for one in self.layers:
            alike.setdefault((one.key, one.value), []).append(one.index)
        if alike:
            row["layers"] = {
                _ranges(numbers): {
                    name: {"dtype": side.dtype.name, "rotation": side.name}
                    for name, side in (("key", key), ("value", value))
                    if side
                }
                for (key, value), numbers in alike.items()
            }
        if self.calibration not in (None, Calibration()):
            row["calibration"] = self.calibration.spec()
        return row

    # ---- what it is called

    @cached_property
    def dtype_name(self) -> str:
        """`int4_per_token_head:int2_per_token_head`, or one name for both; `+w64s4` and what else it has.

        Of many layers with dtypes of their own their number and a hash, `+l28-1f2e3d4c`: that is no name to parse.
        """
        own = self._layer_labels
        if len(own) > MOST_LABELS:
            own = [f"l{len(own)}-{hashlib.sha256('+'.join(own).encode()).hexdigest()[:8]}"]
        page = self.page_tokens
        # a page that is being filled goes without saying
        window = None if page and self.window == Window(0, 0, page) else self.window
        extras = [window.label(page) if window else "", *own]
        extras.append(self.calibration.label if self.calibration else "")
        return "+".join([join_pair(self.key.dtype.name, self.value.dtype.name), *filter(None, extras)])

    @property
    def _layer_labels(self) -> list[str]:
        return [layer.label(self.key, self.value) for layer in self.layers]

    @cached_property
    def rotation_name(self) -> str:
        """`hadamard`, or `center+hadamard:hadamard` where keys and values differ."""
        return join_pair(self.key.name, self.value.name)

    def columns(self) -> dict[str, str]:
        """What tables and records call it."""
        return {"dtype": self.dtype_name, "rotation": self.rotation_name}

    @property
    def label(self) -> str:
        """`int4_per_token_head · hadamard`."""
        return " · ".join(self.columns().values())

    def identity(self) -> dict[str, Any]:
        """All that decides what it stores; what is as it was before schemes had more is left out."""
        row: dict[str, Any] = dict(self.columns())
        if self.window is not None:
            row["window"] = {"sinks": self.window.sinks, "recent": self.window.recent, "page": self.window.page}
        if self.layers:
            row["layers"] = self._layer_labels
        if self.calibration is not None:
            row["calibration"] = self.calibration.identity()
        return row

    def learning(self) -> dict[str, Any]:
        """All that decides what a scheme that learns is taught of a model."""
        assert self.calibration is not None
        other = {str(one.index): one.key.lesson for one in self.layers if one.key and one.key.lesson != self.key.lesson}
        values = {one.index: one.value for one in self.layers if one.value and one.value.learns}
        other |= {f"{index}.value": side.lesson for index, side in values.items() if side.lesson != self.value.lesson}
        return {
            "rotation": join_pair(self.key.lesson, self.value.lesson),
            "calibration": self.calibration.identity(),
            **({"layers": other} if other else {}),
        }

    # ---- what it is for a model

    @property
    def learns(self) -> bool:
        """Whether it needs a calibration text."""
        return any(side.learns for side in self.all_sides)

    @cached_property
    def dtypes(self) -> list[Dtype]:
        """All that its layers have, each once."""
        return list(dict.fromkeys(side.dtype for side in self.all_sides))

    @cached_property
    def page_tokens(self) -> int:
        """Tokens of the pages that its dtypes quantize whole; 0 where every row is by itself.

        Raises:
            ValueError: dtypes with pages of two sizes.
        """
        found = {dtype.page_tokens: dtype.name for dtype in self.dtypes if dtype.page_tokens}
        if len(found) > 1:
            raise ValueError(f"a scheme has pages of one size: {' and '.join(found.values())} have two")
        return next(iter(found), 0)

    @property
    def sides(self) -> tuple[Side, Side]:
        """Keys', then values', in layers without an override."""
        return self.key, self.value

    @property
    def all_sides(self) -> list[Side]:
        """All that its layers have, each once; the keys' and the values' of layers without an override first."""
        more = [side for layer in self.layers for side in (layer.key, layer.value) if side]
        return list(dict.fromkeys([self.key, self.value, *more]))

    def resolve(self, model_dtype: torch.dtype) -> Self:
        """This scheme with `auto` replaced by the model's own dtype."""
        return replace(
            self,
            key=self.key.resolve(model_dtype),
            value=self.value.resolve(model_dtype),
            layers=tuple(layer.resolve(model_dtype) for layer in self.layers),
        )

    def layer(self, index: int, count: int) -> tuple[Side, Side]:
        """How layer `index` of `count` stores its keys and its values."""
        key, value = self.key, self.value
        for override in self.layers:
            if override.index % count == index:
                key, value = override.key or key, override.value or value
        return key, value

    def alone(self, index: int | None, count: int, which: Literal["key", "value"]) -> Self:
        """One layer of `count` with its keys, or its values, as here, and all else exact; with index None all exact."""
        exact = Side(all_dtypes()["auto"])
        if index is None:
            return replace(self, key=exact, value=exact, layers=(), calibration=None)
        key, value = self.layer(index, count)
        side = key if which == "key" else value
        only = Override(index, *((side, None) if which == "key" else (None, side)))
        calibration = self.calibration if side.learns else None
        return replace(self, key=exact, value=exact, layers=(only,), calibration=calibration)

    def check(self, layers: Layers, max_length: int | None = None) -> None:
        """Raises ValueError where a model of these layers and positions can't have it."""
        for override in self.layers:
            if not -len(layers) <= override.index < len(layers):
                raise ValueError(
                    f"layers: there is no layer {override.index}: "
                    f"the model's go from 0 to {len(layers) - 1}, or from -1 back to {-len(layers)}"
                )
        for index, (_, head_dim) in enumerate(layers):
            for side in self.layer(index, len(layers)):
                side.dtype.check_head_dim(head_dim)
        if self.window and max_length is not None and self.window.tokens(max_length + 1) > max_length:
            kept = self.window.tokens(max_length + 1)
            raise ValueError(
                f"window: at least {kept} tokens in 16 bits are more than the model's {max_length} positions: "
                f"take fewer recent pages or sinks"
            )

    def exact(self, model_dtype: torch.dtype) -> Self:
        """How the rows of the window are stored: transformed alike, in 16 bits; as the model has them if not at all."""

        def side(one: Side) -> Side:
            return replace(one, dtype=all_dtypes()["fp16" if one.transforms else "auto"].resolve(model_dtype))

        layers = tuple(
            replace(one, key=one.key and side(one.key), value=one.value and side(one.value)) for one in self.layers
        )
        return type(self)(side(self.key), side(self.value), layers=layers, calibration=self.calibration)

    # ---- bytes

    def bits_per_value(self, head_dim: int) -> float:
        """True bits a value of a token outside the window, in a layer without an override: mean of keys and values."""
        return (self.key.dtype.bits_per_value(head_dim) + self.value.dtype.bits_per_value(head_dim)) / 2

    def row_bytes(self, head_dim: int) -> float:
        """Bytes of K and V together for one token and one head, outside the window, in a layer without an override."""
        return self.key.dtype.row_bytes(head_dim) + self.value.dtype.row_bytes(head_dim)

    def token_bytes(self, layers: Layers) -> float:
        """Packed bytes of one token's keys and values over all layers. The scheme is resolved."""
        return sum(self.layer_bytes(layers))

    def layer_bytes(self, layers: Layers) -> list[float]:
        """The same of each layer."""
        sides = [(self.layer(i, len(layers)), shape) for i, shape in enumerate(layers)]
        return [sum(heads * side.dtype.row_bytes(head_dim) for side in both) for both, (heads, head_dim) in sides]

    def nbytes(self, layers: Layers, tokens: int, model_dtype: torch.dtype) -> int:
        """Bytes that an engine holds for a sequence of so many tokens: packed rows, and a ring in 16 bits.

        Pages that are quantized whole count whole.
        """
        page = self.page_tokens or 1
        packed = int(self.resolve(model_dtype).token_bytes(layers) * -(-tokens // page) * page)
        if self.window is None:
            return packed
        return packed + int(self.exact(model_dtype).token_bytes(layers) * self.window.tokens(tokens))


def find_dtype(name: Any, others: Collection[str] = ()) -> Dtype:
    """The dtype of a name, which may be short. others: what an unknown name may be meant for besides.

    Raises:
        ValueError: no name, or more than one.
    """
    if not isinstance(name, str):
        raise ValueError(f"expected a dtype's name, not {name!r}")
    return all_dtypes()[find_name(name, all_dtypes(), "dtype", others)]


def find_preset(name: str) -> str | None:
    """The preset that a name means, which may be short; None where it is a dtype's, or neither's.

    Raises:
        ValueError: it is short for more than one.
    """
    presets = [preset for preset in all_presets() if preset not in all_dtypes()]
    if name in presets or not name:
        return name or None
    if any(dtype.startswith(name) for dtype in all_dtypes()):
        return None
    begins = [preset for preset in presets if preset.startswith(name)]
    return find_name(name, presets, "scheme") if begins else None


def _overrides(layers: Any, scheme: Scheme) -> tuple[Override, ...]:
    """The overrides of `{0: int8, "-1": {key: int4}, "3,5-8": {key: {dtype: int8, rotation: center}}}`.

    A dtype without a rotation has the transforms of the scheme.
    """
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"layers: expected a mapping from a layer's number to a dtype, not {layers!r}")
    found: dict[int, Override] = {}
    for numbers, pair in layers.items():
        if isinstance(pair, Mapping) and set(pair) <= {"key", "value"}:
            pair = {"key": SAME, "value": SAME, **pair}
        elif isinstance(pair, Mapping):
            pair = {"key": pair, "value": pair}
        sides = [_side(one, own) for one, own in zip(split_pair(pair), (scheme.key, scheme.value), strict=True)]
        for index in _numbers(str(numbers)):
            if index in found:
                raise ValueError(f"layers: layer {index} appears twice")
            found[index] = Override(index, *sides)
    # in one order, however they are grouped: the same layers are the same scheme
    return tuple(found[index] for index in sorted(found, key=lambda n: (n < 0, n)))


def _numbers(text: str) -> list[int]:
    """The numbers of `3`, `-1` or `0,3-8`."""
    found: list[int] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r" *(?:(-?\d{1,6})|(\d{1,6})-(\d{1,6})) *", part)):
            raise ValueError(f"layers: {text!r} is no layer's number")
        one, first, last = match.groups()
        found += [int(one)] if one else range(int(first), int(last) + 1)
    return found


def _ranges(numbers: Sequence[int]) -> str:
    """The text that `_numbers` reads: `0,3-8,-1`."""
    parts: list[list[int]] = []
    for number in sorted(numbers, key=lambda n: (n < 0, n)):
        if parts and number > 0 and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _side(spec: Any, scheme: Side) -> Side | None:
    """The side of a layer: a dtype's name, or a mapping with `dtype` and `rotation`; None as the scheme has it."""
    if spec == SAME:
        return None
    if isinstance(spec, Mapping):
        if set(spec) != {"dtype", "rotation"} or not isinstance(spec["rotation"], str):
            raise ValueError(f"layers: expected a dtype, or a mapping with 'dtype' and 'rotation', not {dict(spec)!r}")
        return Side.of(find_dtype(spec["dtype"]), spec["rotation"])
    return replace(scheme, dtype=find_dtype(spec))


def split_pair(pair: Pair) -> tuple[Any, Any]:
    """The names for keys and for values.

    Raises:
        ValueError: a mapping without exactly the keys `key` and `value`, or more than one colon.
    """
    if isinstance(pair, Mapping):
        if set(pair) != {"key", "value"}:
            raise ValueError(f"a pair has the keys 'key' and 'value', not {', '.join(map(repr, pair))}")
        return pair["key"], pair["value"]
    if not isinstance(pair, str):
        raise ValueError(f"expected a name, KEY:VALUE or {{key: …, value: …}}, not {pair!r}")
    parts = pair.split(":")
    if len(parts) > 2:
        raise ValueError(f"'{pair}' has more than one colon: write KEY:VALUE")
    return parts[0], parts[-1]


def join_pair(key: str, value: str) -> str:
    """One name where both are the same, else `key:value`."""
    return key if key == value else f"{key}:{value}"
