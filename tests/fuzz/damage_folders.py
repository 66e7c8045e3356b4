"""Damaged run folders: tables as of the undamaged one, or a line that names the file that is not as it was."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from campaign import Broken, Case, refusal, toy_sweeps
from typer.testing import CliRunner

from kvbench.cli import app
from kvbench.results.record import checksum
from kvbench.results.store import file_checksum
from kvbench.sweep.command import Options, run_sweep

RESULTS = Path(__file__).parents[2] / "results"
COMMAND_LINE = 30  # of this many cases one is taken by processes of their own
ODD = (None, True, -1, 0, 10**400, 0.5, 1e308, "", "4", "nan", "x" * 300, [], {}, [None], [[]], {"a": []}, "\x1b[31m")
UNSEEN_CHANGE = "taken as it is, without a checksum"


@dataclass(frozen=True)
class Base:
    """A whole folder and what the commands say of it. summed: its files have checksums, so that no change is unseen."""

    folder: Path
    summed: bool
    verbs: dict[str, tuple[str, ...]]
    said: dict[str, tuple[int, str, str]]


def bases(folder: Path) -> list[Base]:
    """A sweep as it is written today, the same of version 1, and kernel times; beside them a file for `check` or times.

    Records of version 1 have no checksum: a change of a number in them is seen by nobody, which the outcomes count.
    """
    toys = folder / "toys"
    toy = toy_sweeps()
    config = toy.write_config(folder / "toys.yaml", dtypes=["fp16", "int4"], margin="1pp")
    with contextlib.redirect_stderr(io.StringIO()):
        code = run_sweep(config, Options(output=toys / "run"), toy.PARTS)
    assert code == 0
    _run(("check", str(toys / "run"), "--write", str(toys / "base.json")))
    old = folder / "old"
    shutil.copytree(toys, old)
    for record in old.glob("run/cells/*/record.json"):
        row = json.loads(record.read_text())
        del row["sha256"]
        kept = ("name", "value", "stderr", "n", "unit", "higher_is_better")
        row |= {"version": 1, "metrics": [{name: metric[name] for name in kept} for metric in row["metrics"]]}
        record.write_text(json.dumps(row))
    for file in (old / "run/run.json", old / "base.json"):
        row = json.loads(file.read_text())
        row.pop("sha256", None)
        file.write_text(json.dumps(row))
    kernels = folder / "kernels"
    rows = []
    for cell in sorted((RESULTS / "kernels-h100/cells").glob("decode-1x8192-*")):
        shutil.copytree(cell, kernels / "run/cells" / cell.name)
        samples = pd.read_parquet(cell / "samples.parquet")["us"].tolist()
        rows.append({**json.loads((cell / "record.json").read_text())["facts"], "samples_us": samples})
    gpus = {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}
    (kernels / "rows.json").write_text(json.dumps({"rows": rows, "environment": gpus}))
    scores = {
        "report": ("report", "run", "--format", "json"),
        "page": ("report", "run", "--format", "html"),
        "export": ("export", "run", "--to", "eee"),
        "compare": ("compare", "run", "--format", "json"),
        "check a file": ("check", "run", "--against", "base.json"),
        "check a folder": ("check", "whole", "--against", "run"),
    }
    times = {
        "report": ("report", "run", "--format", "json"),
        "compare": ("compare", "run", "--format", "json"),
        "compare a file": ("compare", "rows.json", "--format", "json"),
        "check a folder": ("check", "run", "--against", "whole"),
    }
    found = []
    for one, summed, verbs in ((toys, True, scores), (old, False, scores), (kernels, False, times)):
        shutil.copytree(one / "run", one / "whole")
        copy = _copied(one, folder / "copy")
        said = {name: _taken(copy, verb) for name, verb in verbs.items()}
        found.append(Base(one, summed, verbs, said))
    return found


def _copied(folder: Path, copy: Path) -> Path:
    """A copy under a name of its own, since what is said has the path in it."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy


def _run(arguments: tuple[str, ...]) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def _taken(copy: Path, verb: tuple[str, ...], process: bool = False) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command over a copy."""
    places = {"run", "whole", "base.json", "rows.json"}
    arguments = tuple(str(copy / word) if word in places else word for word in verb)
    if not process:
        return _run(arguments)
    done = subprocess.run([sys.executable, "-m", "kvbench.cli", *arguments], capture_output=True, text=True, timeout=60)
    if done.returncode not in (0, 1, 2, 5):
        raise Broken("traceback", f"exit {done.returncode}: {done.stderr}")
    return done.returncode, done.stdout, done.stderr


# ---- damages, each of which gives the path that it was done to


def _file(draw: random.Random, copy: Path) -> Path:
    """A file that commands read."""
    files = sorted(path for path in copy.rglob("*") if path.is_file() and "whole" not in path.parts)
    read = [path for path in files if path.suffix in (".json", ".parquet") and path.name != "report.json"]
    single = [path for path in read if "cells" not in path.parts]
    return draw.choice(draw.choice(([path for path in read if path not in single], single or read)))


def _bits(draw: random.Random, copy: Path) -> Path:
    """One to eight bits are others."""
    path = _file(draw, copy)
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return path


def _cut(draw: random.Random, copy: Path) -> Path:
    """The end is lost, or a block in the middle is zeros, as a power cut leaves it."""
    path = _file(draw, copy)
    content = path.read_bytes()
    at = draw.randrange(len(content))
    path.write_bytes(draw.choice((content[:at], content[:at] + bytes(len(content) - at))))
    return path


def _lost(draw: random.Random, copy: Path) -> Path:
    """A file or a folder is gone."""
    path = _file(draw, copy)
    path = draw.choice((path, path, path.parent)) if "cells" in path.parts else path
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return path


def _instead(draw: random.Random, copy: Path) -> Path:
    """Something else is in a file's place: a folder, a FIFO, a link to a copy, to nothing, to a device or to itself."""
    path = draw.choice((_file(draw, copy), _file(draw, copy), copy / "run/cells", copy / "run/report.json"))
    aside = copy / "aside"
    if path.exists():
        path.rename(aside)
    kind = draw.randrange(6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    else:
        path.symlink_to((aside, "nothing", "/dev/zero", path)[kind - 2])
    return path


def _another(draw: random.Random, copy: Path) -> Path:
    """The file of another place."""
    path, other = _file(draw, copy), _file(draw, copy)
    shutil.copy(other, path.with_name(f".{path.name}"))
    path.with_name(f".{path.name}").rename(path)
    return path


def _json(draw: random.Random, copy: Path) -> tuple[Path, Any]:
    files = {path for _ in range(30) if (path := _file(draw, copy)).suffix == ".json"}
    path = draw.choice(sorted(files))
    return path, json.loads(path.read_text())


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value with each of its keys."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _value(draw: random.Random, copy: Path) -> Path:
    """One value is another of its type, is lost, or has changed places with another."""
    path, row = _json(draw, copy)
    places = list(_places(row))
    inner, key = draw.choice(places)
    kind = draw.randrange(3)
    if kind == 0:
        del inner[key]
    elif kind == 1:
        there, other = draw.choice(places)
        inner[key], there[other] = there[other], inner[key]
        if any(one is inner for one, _ in _places(inner)):  # it stands inside itself
            return _value(draw, copy)
    elif isinstance(inner[key], bool):
        inner[key] = not inner[key]
    elif isinstance(inner[key], (int, float)):
        inner[key] += draw.choice((1, -1, 0.01))
    elif isinstance(inner[key], str):
        inner[key] += draw.choice(("x", "0", " "))
    else:
        inner[key] = draw.choice(ODD)
    path.write_text(json.dumps(row))
    return path


def _type(draw: random.Random, copy: Path) -> Path:
    """A value of another type, in a file that is signed all the same: no checksum hides it."""
    path, row = _json(draw, copy)
    signed = isinstance(row, dict) and isinstance(row.get("sha256"), (dict, str))
    sums = row.pop("sha256") if signed else None
    inner, key = draw.choice(list(_places(row)))
    inner[key] = draw.choice(ODD)
    if signed:
        row["sha256"] = {**sums, "record": checksum(row)} if isinstance(sums, dict) else checksum(row)
    path.write_text(json.dumps(row))
    return path


def _column(draw: random.Random, copy: Path) -> Path:
    """A column of the samples has another type, is lost, or has other rows; signed too, where the record is."""
    path = draw.choice(sorted(copy.glob("run/cells/*/samples.parquet")))
    frame = pd.read_parquet(path)
    name = draw.choice(list(frame.columns))
    values = frame[name].tolist()
    changes: list[Callable[[], Any]] = [
        lambda: frame.assign(**{name: [str(value) for value in values]}),
        lambda: frame.assign(**{name: [[value] for value in values]}),
        lambda: frame.assign(**{name: [{"a": value} for value in values]}),
        lambda: frame.assign(**{name: [None] * len(values)}),
        lambda: frame.assign(**{name: [None, *values[1:]]}),
        lambda: frame.assign(**{name: pd.Timestamp("2020-01-01")}),
        lambda: frame.assign(**{name: [str(value).encode() for value in values]}),
        lambda: frame.assign(**{name: 1e308}),
        lambda: frame.assign(**{name: float("nan")}),
        lambda: frame.assign(**{name: True}),
        lambda: frame.assign(**{name: pd.Categorical([str(value) for value in values])}),
        lambda: frame.assign(**{name: pd.to_timedelta(range(len(values)), unit="s")}),
        lambda: frame.drop(columns=name),
        lambda: frame.rename(columns={name: f"{name}2"}),
        lambda: frame.set_index(name),
        lambda: frame.iloc[:0],
        lambda: frame.iloc[1:],
        lambda: pd.concat([frame, frame]),
        lambda: frame.assign(**{name: values[::-1]}),
    ]
    draw.choice(changes)().to_parquet(path)
    record = path.with_name("record.json")
    row = json.loads(record.read_text())
    if "sha256" in row and draw.random() < 0.7:
        row["sha256"]["samples"] = file_checksum(path)
        record.write_text(json.dumps(row))
        return record  # signed anew
    return path


DAMAGES = (_bits, _bits, _cut, _lost, _instead, _instead, _another, _value, _value, _type, _type, _type, _column)


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    """Damaged folders, each read by every command that reads one."""
    known = bases(folder)
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        base = draw.choice((known[0], known[0], known[1], known[2]))
        damage = draw.choice(DAMAGES)
        name = f"folder {seed}/{number}: {base.folder.name}, {damage.__name__.strip('_')}"
        yield Case(name, partial(read, base, damage, draw, folder / "copy", number % COMMAND_LINE == 0))


def read(base: Base, damage: Callable[..., Path], draw: random.Random, copy: Path, process: bool) -> str:
    """The outcome of all commands over a folder with this damage: the one that most is said of."""
    path = damage(draw, _copied(base.folder, copy))
    # what was signed anew, or never signed, may say something else
    provable = base.summed and damage is not _type and not (damage is _column and path.name == "record.json")
    outcomes = {_outcome(base, verb, path, _taken(copy, base.verbs[verb], process), provable) for verb in base.verbs}
    return next(one for one in ("refused", "named in a line", UNSEEN_CHANGE, "the same") if one in outcomes)


def _outcome(base: Base, verb: str, path: Path, said: tuple[int, str, str], provable: bool) -> str:
    code, stdout, stderr = said
    if said == base.said[verb]:
        return "the same"
    refusal(0, stdout, stderr, None, "")  # no control characters
    # the file, its cell, or the folder that it is in
    cell = path.parent.name if path.parent.parent.name == "cells" else path.name
    names = "|".join(map(re.escape, dict.fromkeys((cell, path.name))))
    if path.name == "cells":
        names += "|has no finished cell"
    known = "".join(base.said[verb][1:])
    new = any(re.search(names, line) for line in (stdout + stderr).splitlines() if line not in known)
    if stderr.startswith("error: "):
        if not new and provable:
            raise Broken("refusal without a place", f"{verb}: {stderr[:2000]}")
        return "refused"
    if code not in (0, 1, 5):
        raise Broken("no message", f"{verb}: exit {code}: {stderr[:2000]}")
    if new:
        return "named in a line"
    if provable:
        raise Broken("difference", f"{verb}, {path}: exit {code}\n{stdout[-1500:]}\n{stderr[-500:]}")
    return UNSEEN_CHANGE
