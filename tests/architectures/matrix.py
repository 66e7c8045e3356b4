"""Every causal language model of transformers, tiny and random: kvbench is right about it, or refuses it.

`python matrix.py FILE` asks about all of them (or `--only NAME ...`), each in a process of its own, and writes FILE.
What is right is decided here, against plain transformers, and not by kvbench's own comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from torch import Tensor

from kvbench.runners import agreement
from kvbench.runners.base import GenerateRequest, ScoreRequest
from kvbench.runners.catalog import resolve
from kvbench.runners.model_files import one_line
from kvbench.runners.toy import toy_tokenizer
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.sweep.config import ModelSpec
from kvbench.sweep.parts import find_model

SECONDS = 120  # for one architecture
MEMORY = 6 * 2**30
WRONG = 0.01  # nats: what is wrong is off by tenths, float32 by millionths
LONG, SHARED, OWN, SHORT, MADE = 48, 20, 16, 12, 8
EXACT = Scheme.parse("auto")


def ask(name: str) -> dict[str, Any]:
    """What became of one architecture.

    outcome: "match"; "refused", with where ("plan", "load", "agreement") and the line; "WRONG", which must not be;
    "raises", which neither; or "not made", where transformers itself can't run it at this size.
    difference: the largest of a log-probability, in nats. agreement_alone: it refuses what everything else lets pass.
    """
    try:
        config = tiny.tiny_config(name)
        if refusal := refused_by_configuration(config):
            return refusal
        model = tiny.tiny_model(config)
        plain = tiny.log_probs(copy.deepcopy(model), draw(LONG, 1))
        if not plain.isfinite().all():
            return {"outcome": "not made", "line": "its logits are not finite"}
    except Exception as error:
        return {"outcome": "not made", "line": f"{type(error).__name__}: {one_line(error)}"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            toy_tokenizer().save_pretrained(folder)
        except Exception as error:
            return {"outcome": "not made", "line": f"{type(error).__name__}: {one_line(error)}"}
        return answer(folder, model)


def refused_by_configuration(config: Any) -> dict[str, Any]:
    """Whether `plan` refuses a model of this configuration, whatever its weights; else empty."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        (Path(folder) / "model.safetensors").touch()
        try:
            find_model(ModelSpec(name=folder, compute_dtype="float32"))
        except ValueError as error:
            return {"outcome": "refused", "where": "plan", "line": str(error).replace(Path(folder).name, "MODEL")}
    return {}


def answer(folder: str, model: Any) -> dict[str, Any]:
    """What kvbench says of the model in this folder, from the first question on, and whether its numbers are right."""
    where = "plan"
    try:
        find_model(ModelSpec(name=folder, compute_dtype="float32"))
        where = "load"
        loaded = TransformersModel.load(resolve(folder))
        where = "agreement"
        refusal = None
        try:
            agreement.check(loaded)
        except ValueError as error:
            refusal = str(error)
        where = "measuring"
        wrong, difference = differs(loaded, model)
    except ValueError as error:
        if where != "measuring":
            return {"outcome": "refused", "where": where, "line": str(error).replace(Path(folder).name, "MODEL")}
        if refusal:
            line = refusal.replace(Path(folder).name, "MODEL")
            return {"outcome": "refused", "where": "agreement", "line": line, "measured": one_line(error)}
        return {"outcome": "raises", "where": where, "line": f"{type(error).__name__}: {one_line(error)}"}
    except Exception as error:
        if where == "measuring" and refusal:
            line = refusal.replace(Path(folder).name, "MODEL")
            return {"outcome": "refused", "where": "agreement", "line": line, "measured": one_line(error)}
        return {"outcome": "raises", "where": where, "line": f"{type(error).__name__}: {one_line(error)}"}
    measured = {"difference": difference, **({"what": wrong} if wrong else {})}
    if refusal:
        line = refusal.replace(Path(folder).name, "MODEL")
        return {"outcome": "refused", "where": "agreement", "line": line, **measured}
    return {"outcome": "WRONG" if wrong else "match", **measured}


def differs(loaded: TransformersModel, model: Any) -> tuple[str, float]:
    """What of kvbench's numbers is not the model's (empty: nothing), and the largest difference, in nats.

    model: as transformers made it, apart from the one that kvbench loaded; copied for each question, so that none
    finds what another left.
    """
    runner = loaded.runner(EXACT)
    long = draw(LONG, 1)
    forked = long[:SHARED] + draw(OWN, 2)
    short = draw(SHORT, 3)
    found: dict[str, float] = {}
    first = scored(runner, [long, forked])
    for what, tokens, ours in (("one prompt", long, first[0]), ("a shared prefix", forked, first[1])):
        found[what] = furthest(ours, wanted(model, tokens))
    found["a short request after a long one"] = furthest(scored(runner, [short])[0], wanted(model, short))
    ours = scored(loaded.runner(EXACT, scoring="replay"), [short])[0]
    found["token by token"] = min(furthest(ours, wanted(model, short)), furthest(ours, stepped(model, short)))
    made = list(runner.generate([GenerateRequest(tuple(long), MADE), GenerateRequest(tuple(short), MADE)])[0].tokens)
    if made and not runner.rope_moves:
        rows = tiny.log_probs(copy.deepcopy(model), long + made[:-1])[-len(made) :]
        chosen = rows[torch.arange(len(made)), torch.tensor(made)]
        found["an answer"] = float((rows.max(-1).values - chosen).max())
    destroyed = scored(loaded.runner(EXACT, destroyed=True), [long])[0]
    wrong = [what for what, value in found.items() if not value <= WRONG]
    if furthest(destroyed, first[0]) <= WRONG:
        wrong.append("the cache is not read")
    return ", ".join(wrong), max(found.values())


def draw(count: int, seed: int) -> list[int]:
    """Token ids that every vocabulary here has, none of them special."""
    return torch.randint(10, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def scored(runner: Any, sequences: list[list[int]]) -> list[Tensor]:
    """Log-probabilities of all tokens of each sequence but its first."""
    return [score.logprobs for score in runner.score([ScoreRequest(tuple(s[:1]), tuple(s[1:])) for s in sequences])]


def wanted(model: Any, tokens: list[int]) -> Tensor:
    """The same by transformers, in one pass without a cache."""
    rows = tiny.log_probs(copy.deepcopy(model), tokens[:-1])
    return rows[torch.arange(len(rows)), torch.tensor(tokens[1:])]


@torch.inference_mode()
def stepped(model: Any, tokens: list[int]) -> Tensor:
    """The same by transformers, token by token into its own cache; nothing where it can't."""
    model, cache, found = copy.deepcopy(model), None, []
    try:
        for token, following in itertools.pairwise(tokens):
            out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[0, -1].float().log_softmax(-1)[following])
    except Exception:
        return torch.full((len(tokens) - 1,), torch.inf)
    return torch.stack(found)


def furthest(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where one is not finite."""
    return float((a - b).abs().nan_to_num(nan=torch.inf).max())


# ---- all of them


def ask_apart(name: str) -> dict[str, Any]:
    """`ask` in a process of its own, so that no architecture can harm the next."""
    context = multiprocessing.get_context("fork")
    theirs, ours = context.Pipe()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        with Path(os.devnull).open("w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
            theirs.send(ask(name))

    process = context.Process(target=work)
    began = time.monotonic()
    process.start()
    theirs.close()
    found: dict[str, Any] = {"outcome": "not made", "line": f"not done after {SECONDS} s"}
    if ours.poll(SECONDS):
        try:
            found = ours.recv()
        except EOFError:
            process.join()
            found = {"outcome": "not made", "line": f"its process ended with {process.exitcode}: memory, most likely"}
    process.kill()
    process.join()
    return {"name": name, **found, "seconds": round(time.monotonic() - began, 1)}


def form(line: str) -> str:
    """A refusal without what is the model's own, so that lines of one kind can be counted."""
    line = re.sub(r"can't run on this cache: .*", "can't run on this cache: …", line)
    line = re.sub(r"(?<= )'[\w.-]+'", "'…'", line)
    line = re.sub(r" here: <.*", "", line)
    line = re.sub(r"read this model's configuration: .*", "read this model's configuration: …", line)
    return re.sub(r"\d[\d.e+-]*\d|\d|\binf\b", "…", line)


def table(rows: list[dict[str, Any]]) -> str:
    """Counts by outcome, and of the refused by where and by which line, as Markdown."""
    counts = Counter(row["outcome"] for row in rows)
    lines = ["| outcome | architectures |", "|:---|---:|"]
    lines += [
        f"| **{outcome}** | {counts[outcome]} |" for outcome in ("match", "WRONG", "raises", "not made", "refused")
    ]
    refused = Counter((row["where"], form(row["line"])) for row in rows if row["outcome"] == "refused")
    order = ("plan", "load", "agreement")
    for (where, line), count in sorted(refused.items(), key=lambda item: (order.index(item[0][0]), -item[1], item[0])):
        lines.append(f"| at {where}: {line} | {count} |")
    return "\n".join(lines)


def main() -> int:
    """Asks, writes, prints the table; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--only", nargs="+", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for name in arguments.only or tiny.names():
        rows.append(ask_apart(name))
        sys.stderr.write(f"{json.dumps(rows[-1])}\n")
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if arguments.file:
        arguments.file.parent.mkdir(parents=True, exist_ok=True)
        content = {"command": "make architectures", "versions": versions, "architectures": rows}
        arguments.file.write_text(json.dumps(content, indent=1) + "\n")
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(table(rows) + "\n")
    return int(any(row["outcome"] in ("WRONG", "raises") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
