"""How folders are listed and names are found."""

import re
import textwrap

import pytest

from kvbench.dtypes import all_dtypes
from kvbench.registry import find_name, suggest, walk
from kvbench.schemes import Scheme
from kvbench.transforms import all_rotations

NAMES = ["fp8_per_tensor", "fp8_per_token_head", "int4_per_token_head", "int2_per_token_head", "auto"]


@pytest.mark.parametrize("name", NAMES)
def test_a_full_name_is_itself(name):
    """
    A name finds itself, even where another begins with it.
    """
    assert find_name(name, [*NAMES, name + "_wide"], "dtype") == name


@pytest.mark.parametrize(
    ("text", "name"),
    [("int2", "int2_per_token_head"), ("int4_per", "int4_per_token_head"), ("a", "auto"), ("fp8_per_te", NAMES[0])],
)
def test_a_unique_beginning_is_enough(text, name):
    """
    Short names are accepted where they are unique.
    """
    assert find_name(text, NAMES, "dtype") == name


def test_a_whole_short_name_is_enough():
    """
    It is found where a longer short name begins with it, and that of two dtypes is neither.
    """
    names = ["tiers421_per_token_head", "tiers42_per_token_head"]
    assert find_name("tiers42", names, "dtype") == names[1]
    assert find_name("tiers421", names, "dtype") == names[0]
    with pytest.raises(ValueError, match="'tiers4' is not unique"):
        find_name("tiers4", names, "dtype")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp8", "dtype 'fp8' is not unique: one of fp8_per_tensor, fp8_per_token_head"),
        ("int", "dtype 'int' is not unique: one of int2_per_token_head, int4_per_token_head"),
        ("nvfp4", r"unknown dtype 'nvfp4': one of auto, "),
        ("int3", "unknown dtype 'int3': there is int2 and int4"),
        ("INT2", r"unknown dtype 'INT2': did you mean int2\?"),
        ("int4_per_tokn_head", r"did you mean int4_per_token_head\?"),
        ("zzz", "unknown dtype 'zzz': one of auto, fp8_per_tensor, fp8_per_token_head, int2_per_token_head, int4"),
        ("", "unknown dtype '': one of auto"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(text, message):
    """
    The message says what is wrong, what there is, and what was meant.
    """
    with pytest.raises(ValueError, match=message):
        find_name(text, NAMES, "dtype")


def test_of_many_names_the_nearest_are_listed():
    """
    Five of them and their number: no line of a hundred names.
    """
    many = [f"{letter}{letter}{letter}" for letter in "abcdefghijklmn"]
    assert suggest("xyz", many).startswith("nearest are ")
    assert suggest("xyz", many).endswith("; there are 14")
    assert suggest("xyz", many).count(",") == 4


@pytest.mark.parametrize("text", ["int5", "kivi3", "turboquant5", "q6_0"])
def test_another_number_is_answered_with_those_there_are(text):
    """
    Of a family of dtypes or presets, and of nothing else.
    """
    with pytest.raises(ValueError, match=f"unknown dtype '{text}': there is ") as caught:
        Scheme.parse(text)
    names = re.split(", | and ", str(caught.value).partition("there is ")[2])
    assert len(names) >= 2
    assert {re.sub("[0-9]+", "", name) for name in names} == {re.sub("[0-9]+", "", text)}
    for name in names:
        Scheme.parse(name)


def test_what_is_suggested_is_accepted():
    """
    Whoever types the suggestion gets on.
    """
    for text in ("int3", "int44", "itn2", "fp16x", "bfp16", "int8_per_token", "fp8_per_tokenhead", "nvfp4", "fp4"):
        suggestion = suggest(text, all_dtypes())
        if suggestion.startswith("did you mean "):
            find_name(suggestion.removeprefix("did you mean ").rstrip("?"), all_dtypes(), "dtype")


def test_a_new_file_is_listed(tmp_path, monkeypatch):
    """
    What a module of the folder holds is found; nothing is registered by hand.
    """
    package = tmp_path / "some_package_of_colours"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text("class Colour(str): pass\n")
    for name in ("red", "blue"):
        (package / f"{name}.py").write_text(
            textwrap.dedent(f"""\
                from some_package_of_colours.base import Colour
                {name} = Colour("{name}")
                not_one = "plain"
            """)
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    from some_package_of_colours.base import Colour

    assert sorted(walk("some_package_of_colours", [str(package)], Colour)) == ["blue", "red"]


def test_the_seed_s_dtypes_are_listed():
    """
    From most bits to fewest, `auto` first.
    """
    seed = [
        "auto",
        "bf16",
        "fp16",
        "fp8_per_tensor",
        "fp8_per_token_head",
        "int8_per_token_head",
        "int4_per_token_head",
        "int2_per_token_head",
    ]

    assert [name for name in all_dtypes() if name in seed] == seed


@pytest.mark.parametrize("dtype", all_dtypes().values(), ids=lambda dtype: dtype.name)
def test_a_dtype_says_where_it_comes_from(dtype):
    """
    Its source is named, its default rotation exists, and it has a default size.
    """
    assert dtype.source
    assert dtype.default_rotation in all_rotations()
    assert 0 < dtype.bits_per_value(128) <= 32


def test_the_seed_s_default_rotations():
    """
    int4 with the randomized Hadamard rotation, int2 with the plain one, the others without.
    """
    defaults = {name: dtype.default_rotation for name, dtype in all_dtypes().items()}

    assert defaults.pop("int4_per_token_head") == "randomized_hadamard"
    assert defaults.pop("int2_per_token_head") == "hadamard"
    assert {defaults[name] for name in ("auto", "bf16", "fp16", "fp8_per_tensor", "int8_per_token_head")} == {"none"}
