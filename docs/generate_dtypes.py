"""Writes docs/dtypes.md from the dtypes and rotations themselves: `make docs`; a test compares."""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import kvbench.dtypes
import kvbench.transforms
from kvbench.dtypes import Affine, Cast, Dtype, Sketch, Tiers, Trellis, all_dtypes
from kvbench.dtypes.blocks import Blocks
from kvbench.presets import all_presets
from kvbench.schemes import Scheme
from kvbench.transforms import Rotation, Transform, all_transforms

INTRODUCTION = """\
<!-- written by docs/generate_dtypes.py (make docs); not by hand -->

# Dtypes, transforms and schemes

A dtype says how the head_dim values of one token and one head, a *row*, become bytes; a transform prepares the row
first, as a rotation turns it. Any dtype goes with any transform. What each does to the bit is in its file, linked
below. A scheme is both, for keys and for values, and what else there is.
"""

SIZES = """\
Bits per value count every byte that is stored: codes, scales and hidden zero-points. Bytes are those of keys and values
together, for one token and one head. `auto` is shown as a 16-bit model has it.
"""

TRANSFORMS = """\
A rotation turns blocks of channels, several side by side with equal signs where D is no power of two. `+` stands
between transforms that follow each other, and keys and values may differ: `center+hadamard:hadamard`. In a sweep's
YAML they stand under `rotations`.
"""

PRESETS = """\
A sweep's `schemes` takes these names, names with a window (`int4+w64s4`: the query's own page of 64 positions, the 64
before it, and the first 4 tokens are read in 16 bits) or with other dtypes in single layers
(`int4+l0=int8+l-1=fp16`), and mappings with `dtype` (or `scheme`, another one's name), `rotation`, `window: {sinks,
recent}`, `layers` and `calibration: {text, tokens}`. A window's pages have 64 positions, or `page: 128`, or as many as
a dtype quantizes whole.
"""

SCHEMES = """\
A dtype whose scale is shared by the tokens of a channel quantizes a page whole, once it has left the window: until
then, and while it is being filled, its rows are in 16 bits. No kernel does so, so the reference computes it.

A name may be shortened where it is unique (`int4`), and keys and values may differ: `int4:int2` is four bits for keys
and two for values (`{key: int4, value: int2}` in YAML).
"""

MOST_CENTROIDS = 8  # that a table spells out


def code(dtype: Dtype) -> str:
    """What one code is."""
    if isinstance(dtype.decode, Cast):
        storage = dtype.decode.storage
        return f"`{str(storage).removeprefix('torch.')}`" if storage else "the model's own type"
    if isinstance(dtype.decode, Affine):
        zeros = {
            "none": "signed",
            "in_scale": "unsigned, zero-point in the scale's low bits",
            "minimum": "unsigned, above a minimum stored beside the scale",
        }
        return f"{dtype.code_bits}-bit integer, {zeros[dtype.decode.zero]}"
    if isinstance(dtype.decode, Trellis):
        parts = dtype.decode.parts
        shares = "".join(f", {part.bits} for {part.eighths}/8 of the channels" for part in parts if len(parts) > 1)
        bits = ", ".join(str(part.bits) for part in parts)
        return f"{bits} bits of a string, of which the last {dtype.decode.state_bits} are a value{shares}"
    if isinstance(dtype.decode, Tiers):
        return f"{', '.join(map(str, dtype.decode.widths))} bits, an eighth of the channels each"
    book = dtype.decode.centroids
    centroids = ", ".join(f"{centroid:g}" for centroid in book)
    if len(book) > MOST_CENTROIDS:
        centroids = f"{len(book)} values from {min(book):g} to {max(book):g}"
    if isinstance(dtype.decode, Sketch):
        return f"{dtype.code_bits - 1}-bit index of {centroids}, and a sign"
    return f"{dtype.code_bits}-bit index of {centroids}"


def first_line(thing: object) -> str:
    """The first line of a docstring."""
    return (thing.__doc__ or "").strip().partition("\n")[0]


def scale(dtype: Dtype) -> str:
    """What shares a scale."""
    by = {"none": "-", "per_tensor": "a layer's K, and its V", "per_token_head": "a row"}
    by["per_channel"] = f"{dtype.page_tokens} tokens of a channel"
    by["learned"] = "a channel, learned"
    group = f"{dtype.group_size} channels of a row"
    if isinstance(dtype, Blocks):
        group += f", `{str(dtype.scale_type).removeprefix('torch.')}`"
    if dtype.tensor_scaled:
        group += ", times one of a layer's K or V"
    return by.get(dtype.granularity, group)


def bits(dtype: Dtype, head_dim: int) -> str:
    """Bits per value, or `-` where such rows do not fit."""
    try:
        return f"{dtype.bits_per_value(head_dim):.4g}"
    except ValueError:
        return "-"


def home(package: ModuleType, name: str) -> ModuleType:
    """The module of the package that defines what has this name."""
    for module in pkgutil.iter_modules(package.__path__):
        found = importlib.import_module(f"{package.__name__}.{module.name}")
        if any(isinstance(value, Dtype | Transform) and value.name == name for value in vars(found).values()):
            return found
    raise LookupError(name)


def link(module: ModuleType) -> str:
    """A link to a module's file."""
    path = module.__name__.replace(".", "/") + ".py"
    return f"[{Path(path).name}](../{path})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def document() -> str:
    """The whole file."""
    dtypes = all_dtypes().values()
    meanings = [
        [
            f"`{d.name}`",
            code(d),
            scale(d),
            f"`{d.default_rotation}`",
            first_line(type(d)),
            d.source,
            link(home(kvbench.dtypes, d.name)),
        ]
        for d in dtypes
    ]
    sizes = [
        [
            f"`{d.name}`",
            *(bits(d, head_dim) for head_dim in (64, 96, 128, 256)),
            str(Scheme.parse(d.name).row_bytes(128)),
        ]
        for d in dtypes
    ]
    transforms = [
        [
            f"`{t.name}`",
            *([str(t.block(128)), str(t.block(96))] if isinstance(t, Rotation) else ["-", "-"]),
            "keys" if t.keys_only else "keys, values",
            "yes" if t.learns else "no",
            first_line(module if isinstance(t, Rotation) else type(t)),
            t.source,
            link(module),
        ]
        for t in all_transforms().values()
        for module in [home(kvbench.transforms, t.name)]
    ]
    presets = [
        [f"`{p.name}`", *(f"`{name}`" for name in Scheme.parse(p.name).columns().values()), p.source]
        for p in all_presets().values()
    ]
    return "\n".join(
        [
            INTRODUCTION,
            "## Dtypes\n",
            table(["dtype", "code", "scale shared by", "default rotation", "", "source", "file"], meanings),
            SCHEMES,
            "## Sizes\n",
            SIZES,
            table(["dtype", "bits, D=64", "D=96", "D=128", "D=256", "bytes of K+V, D=128"], sizes),
            "## Transforms\n",
            TRANSFORMS,
            table(["transform", "block, D=128", "D=96", "for", "learns", "", "source", "file"], transforms),
            "## Schemes by name\n",
            PRESETS,
            table(["scheme", "dtype", "rotation", "source"], presets),
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("dtypes.md").write_text(document(), encoding="utf-8")
