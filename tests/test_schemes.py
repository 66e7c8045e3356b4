"""A scheme's names: what a person writes, and what is shown."""

import pytest
import torch

from kvbench.dtypes import all_dtypes
from kvbench.presets import all_presets
from kvbench.schemes import Scheme, Window, split_pair
from kvbench.transforms import all_rotations

PAIRS = [*((dtype, "hadamard") for dtype in all_dtypes()), *(("int4_per_token_head", one) for one in all_rotations())]


@pytest.mark.parametrize(("dtype", "rotation"), PAIRS)
def test_any_dtype_goes_with_any_rotation(dtype, rotation):
    """
    A scheme keeps the names that it was parsed from, and those names give it back.
    """
    scheme = Scheme.parse(dtype, rotation)

    assert (scheme.dtype_name, scheme.rotation_name) == (dtype, rotation)
    assert Scheme.parse(scheme.dtype_name, scheme.rotation_name) == scheme


@pytest.mark.parametrize("rotation", [None, "default"])
def test_without_a_rotation_each_dtype_has_its_own(rotation):
    """
    int4's keys and int2's values are turned as the seed turned them.
    """
    scheme = Scheme.parse("int4:int2", rotation)

    assert scheme.dtype_name == "int4_per_token_head:int2_per_token_head"
    assert scheme.rotation_name == "randomized_hadamard:hadamard"


@pytest.mark.parametrize(
    ("dtype", "rotation"),
    [
        ("int4:int2", "hadamard:none"),
        ({"key": "int4", "value": "int2"}, {"key": "hadamard", "value": "none"}),
        ({"value": "int2", "key": "int4_per_token_head"}, "hadamard:none"),
    ],
)
def test_keys_and_values_may_differ(dtype, rotation):
    """
    `key:value` and a mapping say the same.
    """
    scheme = Scheme.parse(dtype, rotation)

    assert (scheme.key.dtype.name, scheme.value.dtype.name) == ("int4_per_token_head", "int2_per_token_head")
    assert (scheme.key.name, scheme.value.name) == ("hadamard", "none")


def test_a_pair_of_equals_is_one_name():
    """
    Written twice or once, it is the same scheme with the same name.
    """
    assert Scheme.parse("int4:int4") == Scheme.parse("int4")
    assert Scheme.parse("int4:int4_per_token_head").dtype_name == "int4_per_token_head"


@pytest.mark.parametrize(
    ("dtype", "rotation", "message"),
    [
        ("int7", None, "unknown dtype 'int7': there is int2, int3, int4 and int8"),
        ("int4:int5", None, "unknown dtype 'int5'"),
        ("fp8", None, "dtype 'fp8' is not unique"),
        ("int4:", None, "unknown dtype ''"),
        (":int4", None, "unknown dtype ''"),
        ("int4:int2:int8", None, "'int4:int2:int8' has more than one colon: write KEY:VALUE"),
        ({"key": "int4"}, None, "a pair has the keys 'key' and 'value', not 'key'"),
        ({"key": "int4", "value": "int2", "query": "int8"}, None, "not 'key', 'value', 'query'"),
        ("int4", "hadamrd", r"unknown rotation 'hadamrd': did you mean hadamard\?"),
        ("int4", "hadamard:turn", "unknown rotation 'turn'"),
    ],
)
def test_a_wrong_name_is_refused(dtype, rotation, message):
    """
    The message names what was written and what is near it.
    """
    with pytest.raises(ValueError, match=message):
        Scheme.parse(dtype, rotation)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", ["int4", "int4:int2", "fp16:fp8_per_tensor", "auto"])
def test_bits_are_the_mean_of_keys_and_values(dtype, head_dim):
    """
    8 * bytes of a token and head over its 2 * head_dim values.
    """
    scheme = Scheme.parse(dtype)

    assert 8 * scheme.row_bytes(head_dim) / (2 * head_dim) == pytest.approx(scheme.bits_per_value(head_dim), rel=1e-15)


@pytest.mark.parametrize(
    ("dtype", "row_bytes"),
    [("fp16", 512), ("fp8_per_tensor", 256), ("fp8_per_token_head", 264), ("int8", 264), ("int4", 136), ("int2", 72)],
)
def test_the_seed_s_bytes_of_a_token(dtype, row_bytes):
    """
    K and V of one token and one head of 128 channels.
    """
    assert Scheme.parse(dtype).row_bytes(128) == row_bytes


def test_auto_becomes_the_model_s_dtype():
    """
    Either side of a scheme is resolved, and nothing else changes.
    """
    scheme = Scheme.parse("auto:int4").resolve(torch.float32)

    assert scheme.bits_per_value(128) == (32 + 4.25) / 2
    assert scheme.rotation_name == "none:randomized_hadamard"
    assert scheme.dtype_name == "auto:int4_per_token_head"


def test_splitting():
    """
    One name stands for both.
    """
    assert split_pair("a") == ("a", "a")
    assert split_pair("a:b") == ("a", "b")
    assert split_pair({"key": "a", "value": "b"}) == ("a", "b")


@pytest.mark.parametrize("name", all_presets())
def test_a_preset_says_what_its_columns_say(name):
    """
    A preset is parsed again from the names that tables show, and those of the seed's dtypes are their defaults.
    """
    scheme = Scheme.parse(name)

    assert Scheme.parse(scheme.dtype_name, scheme.rotation_name) == scheme
    if name in all_dtypes():
        assert Scheme.of(all_presets()[name].spec) == scheme


def test_what_is_as_before_is_left_out_of_an_identity():
    """
    Two names for a scheme of before; a window, layers and a calibration are added only where they are.
    """
    assert Scheme.parse("int4", "hadamard").identity() == {"dtype": "int4_per_token_head", "rotation": "hadamard"}
    whole = Scheme.of(
        {"scheme": "int4_centered", "window": {"sinks": 4, "recent": 1}, "layers": {"-1": {"key": "int8"}}}
    )

    identity = whole.identity()
    assert identity["dtype"] == "int4_per_token_head+w64s4+l-1=int8_per_token_head:-"
    assert identity["rotation"] == "center+randomized_hadamard:randomized_hadamard"
    assert identity["window"] == {"sinks": 4, "recent": 1, "page": 64}
    assert identity["layers"] == ["l-1=int8_per_token_head:-"]
    assert identity["calibration"]["tokens"] == 8192
    assert len(identity["calibration"]["text_sha256"]) == 64


@pytest.mark.parametrize(("tokens", "kept"), [(1, 1), (100, 100), (132, 132), (8192, 132)])
def test_a_sequence_s_bytes_are_packed_rows_and_a_ring(tokens, kept):
    """
    Packed rows of all tokens, and 16-bit rows of the sinks and of two pages of 64, or of all there are.
    """
    layers = [(3, 64), (1, 128)]
    packed = Scheme.parse("int4_centered")
    windowed = Scheme.parse("int4_centered_window")

    added = windowed.nbytes(layers, tokens, torch.bfloat16) - packed.nbytes(layers, tokens, torch.bfloat16)
    assert packed.nbytes(layers, tokens, torch.bfloat16) == tokens * (3 * 2 * 36 + 2 * 68)
    assert added == kept * 2 * 2 * (3 * 64 + 128)


@pytest.mark.parametrize(
    ("spec", "name", "window"),
    [
        ({"dtype": "uint2_per_channel_64"}, "uint2_per_channel_64", Window(0, 0, 64)),
        ({"dtype": "uint2_per_channel_128"}, "uint2_per_channel_128", Window(0, 0, 128)),
        (
            {"key": "uint2_per_channel_128", "value": "int2", "window": {"sinks": 4}},
            "uint2_per_channel_128:int2_per_token_head+w0s4",
            Window(4, 0, 128),
        ),
        (
            {"dtype": "uint2_per_channel_128", "window": {"recent": 2}},
            "uint2_per_channel_128+w256",
            Window(0, 2, 128),
        ),
        (
            {"dtype": "int4", "window": {"recent": 2, "sinks": 1, "page": 128}},
            "int4_per_token_head+w256s1p128",
            Window(1, 2, 128),
        ),
        ({"dtype": "int4", "window": {"recent": 2, "page": 64}}, "int4_per_token_head+w128", Window(0, 2, 64)),
        (
            {"dtype": "int8", "layers": {0: "uint2_per_channel_128"}},
            "int8_per_token_head+l0=uint2_per_channel_128",
            Window(0, 0, 128),
        ),
    ],
)
def test_a_window_has_pages_of_64_or_of_the_dtypes(spec, name, window):
    """
    What is quantized by page has a window of that page, which goes without saying; a name with all of it is read back.
    """
    scheme = Scheme.of(spec)

    assert scheme.window == window
    assert scheme.dtype_name == name
    assert Scheme.parse(name, scheme.rotation_name) == scheme
    assert scheme.identity()["window"]["page"] == window.page


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"dtype": "uint2_per_channel_64:uint2_per_channel_128"}, "a scheme has pages of one size"),
        (
            {"dtype": "uint2_per_channel_128", "window": {"recent": 1, "page": 64}},
            "window: a page has 128 tokens, as the scheme's dtypes have it, not 64",
        ),
        ({"dtype": "int4", "window": {"recent": 1, "page": 32}}, "window: a page has 64 or 128 tokens, not 32"),
        ({"dtype": "int4", "window": {"page": 64}}, "no sinks and no recent pages leave nothing in 16 bits"),
        ("uint2_per_channel_128+w64", r"no window, such as \+w64s4 \(w in steps of 128\)"),
    ],
)
def test_pages_that_do_not_go_together_are_refused(spec, message):
    """
    Two sizes, and a window of another page than the dtypes quantize.
    """
    with pytest.raises(ValueError, match=message):
        Scheme.of(spec)


@pytest.mark.parametrize(("tokens", "whole"), [(64, 64), (100, 128), (8192, 8192)])
def test_pages_that_are_quantized_whole_count_whole(tokens, whole):
    """
    Codes of 2 bits and 32 bits a channel and page for keys, for values and 32 channels; a ring of two pages.
    """
    scheme = Scheme.parse("kivi2")
    packed = 3 * 64 * (2 * whole / 4 + 4 * whole / 64 + 4 * whole / 32)
    ring = min(tokens, 128) * 2 * 2 * 3 * 64

    assert scheme.nbytes([(3, 64)], tokens, torch.bfloat16) == packed + ring


def test_layers_have_their_own_dtypes_and_the_scheme_s_transforms():
    """
    The last layer's keys are in 8 bits, its values as all; an index counts from either end.
    """
    scheme = Scheme.of({"dtype": "int4", "layers": {0: "fp16", "-1": {"key": "int8"}}})

    names = [tuple(side.dtype.name for side in scheme.layer(i, 3)) for i in range(3)]
    assert names == [
        ("fp16", "fp16"),
        ("int4_per_token_head", "int4_per_token_head"),
        ("int8_per_token_head", "int4_per_token_head"),
    ]
    assert {side.name for i in range(3) for side in scheme.layer(i, 3)} == {"randomized_hadamard"}


def test_layers_may_have_transforms_of_their_own():
    """
    A mapping with a rotation stands for itself, a dtype alone is turned as the scheme's, and many layers are one key.
    """
    own = {"key": {"dtype": "int8", "rotation": "center"}, "value": "int4"}
    scheme = Scheme.of(
        {"dtype": "int2", "layers": {"0,2-3": own, "-1": {"value": {"dtype": "fp16", "rotation": "none"}}}}
    )

    names = [tuple((side.dtype.name, side.name) for side in scheme.layer(i, 6)) for i in range(6)]
    plain, other = ("int2_per_token_head", "hadamard"), ("int8_per_token_head", "center")
    assert names[0] == names[2] == names[3] == (other, ("int4_per_token_head", "hadamard"))
    assert names[1] == names[4] == (plain, plain)
    assert names[5] == (plain, ("fp16", "none"))
    assert scheme.learns
    assert scheme.identity()["layers"] == [
        *(f"l{i}=int8_per_token_head(center):int4_per_token_head" for i in (0, 2, 3)),
        "l-1=-:fp16(none)",
    ]


def test_many_layers_make_no_long_name():
    """
    Five layers are a number and a hash in the name, which other layers have another of; the identity has them all.
    """
    schemes = [Scheme.of({"dtype": "int2", "layers": {f"{first}-{first + 4}": "int8"}}) for first in (0, 1)]

    names = [scheme.dtype_name.split("+")[1] for scheme in schemes]
    assert names[0] != names[1]
    assert all(name.startswith("l5-") and len(name) == len("l5-1f2e3d4c") for name in names)
    assert all(len(scheme.identity()["layers"]) == 5 for scheme in schemes)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"0-": "int8"}, "layers: '0-' is no layer's number"),
        ({"0-2": "int8", "2": "int4"}, "layers: layer 2 appears twice"),
        ({"0": {"dtype": "int8"}}, "expected a dtype, or a mapping with 'dtype' and 'rotation'"),
        ({"0": {"key": {"dtype": "int8", "rotation": "hadamrd"}}}, "unknown rotation 'hadamrd'"),
        ({"0": {"value": {"dtype": "int8", "rotation": "center"}}}, "'center' on values can't be undone"),
    ],
)
def test_wrong_layers_are_refused(layers, message):
    """
    A range without end, a layer named twice, half a side, an unknown transform, and one that values can't have.
    """
    with pytest.raises(ValueError, match=message):
        Scheme.of({"dtype": "int2", "layers": layers})


def test_layers_are_the_same_however_they_are_grouped():
    """
    Written one by one or in groups that interleave, the name, the identity and the mapping that gives it back agree.
    """
    single = Scheme.of({"dtype": "int2", "layers": {str(i): "int8" if i % 2 else "int4" for i in range(6)}})
    grouped = Scheme.of({"dtype": "int2", "layers": {"1,3,5": "int8", "0,2,4": "int4"}})

    assert single == grouped
    assert single.label == grouped.label
    assert Scheme.of(single.spec()) == single
