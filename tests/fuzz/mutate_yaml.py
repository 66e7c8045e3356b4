"""Mutated YAML files: `kvbench plan` takes each, or says in which line it is wrong."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from campaign import Case, refusal
from typer.testing import CliRunner

from kvbench.cli import app

CONFIGS = Path(__file__).parents[2] / "configs"
SWEEPS = ("quickstart.yaml", "matrix.yaml", "accuracy.yaml", "qwen.yaml")

# what YAML, Python, paths or a table read in a way of their own
WORDS = r"""
null   ~   true   no   on   ''   ""   " "   []   {}   [[]]   [{}]   {a: {}}   - a   x|y   <b>x</b>   =1+1   @x
'`x`'   =   <<   0   -1   010   0x1F   0b11   0o17   1_000   1:30   190:20:30   1e3   1.5   -0.0   .inf   .nan
1e999   1000000000000   ١   ١pp   1 pp   100pp   0pp   2020-13-45   2020-12-01   2020-12-01T25:00:00
!!timestamp 99999   !!int abc   !!float x   !!bool 7   !!binary x   !!binary Zm9v   !!set {a}   !!omap [a: 1]
!!pairs [a: 1]   !!str 5   !!null x   !!seq {}   !x y   !!python/name:os.system
!!python/object/apply:os.system [ls]   &a [*a]   *a   &a x   {&a x: *a}   ~nobodyx/y   /dev/zero   /   .   ..
a\0b   "a\0b"   "a\nb"   "\e[31mred"   "\u202egnp"   "\uD800"   int4:int2:int8   :   int   ::   {key: int4}
{key: int4, value: []}   {dtype: int4, rotation: [x]}   {dtype: {}}   {key: {key: int4}, value: int2}
{task: needle, depths: 1000000000000}   {task: needle, contexts: [1000000000]}   {task: needle, contexts: [-1]}
{task: gsm8k, limit: '5'}   {task: divergence, tokens: 1}   {task: []}   {task: divergence, text: /dev/zero}
{task: mmlu}   {task: niah_single_1}   {task: arc_easy, metadata: {tokenizer: x}}
{task: throughput, batch: 999999999}   {task: leaderboard}   {name: x.gguf}   {name: x.json}
{name: a/b/c, revision: ../x}   {name: /etc}   {name: /dev/zero}   {name: "../../.."}
"""
TRAPS = (
    *re.split("   |\n", WORDS.strip()),
    *("9" * 20, "9" * 400, "9" * 5000, "-" + "9" * 30, "x" * 300, "a/" * 3000, "[" * 900, "{a: " * 900, "? [a]\n: 1"),
    "{task: divergence, text: " + "x" * 300 + "}",
    "\n".join([f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 2) if i else 'x'}]" for i in range(25)]),
    "[&b0 [x], " + ", ".join(f"&b{i} [*b{i - 1}, *b{i - 1}]" for i in range(1, 25)) + "]",
)
CHARACTERS = "\x00\x07\x1b\t\r\u0085\u2028\ufeff\u202e\ud7ff:#-?[]{}&*!|>'\"%@`,\\ ☃𝔸0"
KEYS = re.findall(
    r"\w+",
    "name note model models dtypes rotations tasks baseline canary again margin data seed page_size scoring attention "
    "compute_dtype limit task metadata num_fewshot x",
)


def mutated(draw: random.Random, text: str) -> str:
    """The text with one to four faults."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        text = draw.choice(FAULTS)(draw, text)
    return text


def _value(draw: random.Random, text: str) -> str:
    """Another value behind a key."""
    places = list(re.finditer(r"(?<=: )[^\n#,}\]]+", text))
    if not places:
        return text
    place = draw.choice(places)
    return text[: place.start()] + draw.choice(TRAPS) + text[place.end() :]


def _entry(draw: random.Random, text: str) -> str:
    """Another entry of a list."""
    places = list(re.finditer(r"(?<=[\[,] )[^\n,\]]+|(?<=- )[^\n]+|(?<=\[)[^\n,\]]+", text))
    if not places:
        return text
    place = draw.choice(places)
    return text[: place.start()] + draw.choice(TRAPS) + text[place.end() :]


def _line(draw: random.Random, text: str) -> str:
    """A key more, at the end or anywhere."""
    lines = text.split("\n")
    at = draw.choice((len(lines), draw.randrange(len(lines) + 1)))
    return "\n".join([*lines[:at], f"{draw.choice(KEYS)}: {draw.choice(TRAPS)}", *lines[at:]])


def _lines(draw: random.Random, text: str) -> str:
    """A line lost, twice, elsewhere or deeper."""
    lines = text.split("\n")
    line = lines.pop(draw.randrange(len(lines)))
    for _ in range(draw.choice((0, 1, 2))):
        lines.insert(draw.randrange(len(lines) + 1), " " * draw.choice((0, 0, 1, 2)) + line)
    return "\n".join(lines)


def _key(draw: random.Random, text: str) -> str:
    """Another key."""
    places = list(re.finditer(r"\w+(?=:)", text))
    if not places:
        return text
    place = draw.choice(places)
    return text[: place.start()] + draw.choice((*KEYS, *TRAPS)) + text[place.end() :]


def _character(draw: random.Random, text: str) -> str:
    """A character more, less or other."""
    at = draw.randrange(len(text) + 1)
    return text[:at] + draw.choice(("", draw.choice(CHARACTERS))) + text[at + draw.choice((0, 1)) :]


def _cut(draw: random.Random, text: str) -> str:
    """An end cut off, or a piece of the text once more."""
    start, end = sorted(draw.randrange(len(text) + 1) for _ in range(2))
    return draw.choice((text[:end], text[:end] + text[start:]))


FAULTS = (_value, _value, _value, _entry, _entry, _line, _line, _lines, _key, _character, _character, _cut)


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    """Mutations of the sweeps that ship, each taken by `kvbench plan`."""
    texts = [(CONFIGS / name).read_text(encoding="utf-8") for name in SWEEPS]
    file = folder / "mutated.yaml"
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        text = mutated(draw, draw.choice(texts))
        yield Case(f"yaml {seed}/{number}", partial(planned, file, text))


def planned(file: Path, text: str) -> str:
    """The outcome of `kvbench plan` on this text."""
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    done = CliRunner().invoke(app, ["plan", str(file), "--output", str(file.parent / "none")])
    name = re.escape(str(file))
    # a text that is no UTF-8 has no lines; a file without a key has no line to point at
    return refusal(
        done.exit_code,
        done.stdout,
        done.stderr,
        done.exception,
        rf"^error: {name}(:\d+:\d+: | is not UTF-8|: the file is empty)",
    )
