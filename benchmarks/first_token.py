"""What one stored row, a document's first token, does to LAMBADA's last words, over draws of a rotation's signs.

    python benchmarks/first_token.py MODEL ROWS.jsonl OUT.json [--documents 512] [--draws 4] [--dtype NAME] [--mixed 16]

ROWS: EleutherAI/lambada_openai's, a JSON object with `text` a line. The dtype stores keys and values, keys centred not
at all, by one mean or by page, all turned by a Hadamard matrix with signs of this draw (0: those that kvbench has).
`mixed` has means by page in so many layers and one mean in those behind them.
Each is measured `whole`, with its first token `kept` in 16 bits, and with its first token packed `alone`, all others in
16 bits: a row has the change of the last word's log-probability from the exact cache's, how many words come to be wrong
and right, and the KL divergence, by position too. `first` says how alike first keys are among documents, and how much
is attended to them. The reference computes all; a CPU does it in half an hour for 100 documents of SmolLM2, two draws.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvbench.runners import catalog
from kvbench.runners.base import begins_with
from kvbench.runners.transformers import TransformersModel, TransformersRunner, observed
from kvbench.schemes import Scheme, Side, Window
from kvbench.transforms.randomized_hadamard import RandomizedHadamard
from kvbench.transforms.rotation import SEED

TURN = "randomized_hadamard"
KEYS = {"none": "", "center_constant": "center_constant+", "center": "center+", "mixed": "center+"}
BOUNDS = (0, 1, 4, 16, 64, 10**6)
LOGITS_AT_A_TIME = 2**26
LOOKED_AT, SETTLED = 32, 16  # documents whose attention is looked at, and the position from which on


@dataclass(frozen=True)
class Drawn(RandomizedHadamard):
    """The rotation with another draw of its signs."""

    seed: int = SEED

    def signs(self, head_dim: int) -> Tensor | None:
        block = self.block(head_dim)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        signs = 2 * torch.bernoulli(torch.full((block,), 0.5), generator=generator) - 1
        return signs.repeat(head_dim // block)


class AllButFirst(Window):
    """Every key in 16 bits but the first."""

    def starts(self, positions: Tensor) -> Tensor:
        return torch.ones_like(positions)


@dataclass(frozen=True)
class Document:
    """Its tokens, and how many stand before the last word."""

    tokens: tuple[int, ...]
    context: int


def documents_of(rows: Path, tokenizer: Any, count: int) -> list[Document]:
    """The first documents, encoded as lm-eval does: the space goes with the last word."""
    found = []
    begins = tuple(begins_with(tokenizer))
    for line in rows.read_text(encoding="utf-8").splitlines()[:count]:
        text = json.loads(line)["text"]
        whole, before = (tokenizer(x, add_special_tokens=False).input_ids for x in (text, text.rsplit(" ", 1)[0]))
        found.append(Document((*begins, *whole), len(begins) + len(before)))
    return found


def schemes(dtype: str, keys: str, layers: dict[str, Any], draw: int, longest: int) -> Iterator[tuple[str, Scheme]]:
    """The scheme whole, with its first token kept, and with that one alone packed."""
    scheme = Scheme.of({"dtype": dtype, "rotation": {"key": KEYS[keys] + TURN, "value": TURN}, **layers})
    turned = Drawn(TURN, source="another draw of the signs", seed=SEED + draw)

    def drawn(side: Side) -> Side:
        return replace(side, transforms=(*side.transforms[:-1], turned))

    others = tuple(replace(one, key=one.key and drawn(one.key)) for one in scheme.layers)
    scheme = replace(scheme, key=drawn(scheme.key), value=drawn(scheme.value), layers=others)
    yield "whole", scheme
    yield "kept", replace(scheme, window=Window(sinks=1))
    yield "alone", replace(scheme, window=AllButFirst(recent=longest // Window.page + 1))


def measured(runner: TransformersRunner, exact: list[Tensor], documents: list[Document]) -> dict[str, Any]:
    """What this cache does to last words, and to all that comes."""
    changes, before, after, kld = [], [], [], []
    stored = runner.hidden_states([document.tokens for document in documents])
    vocabulary = runner.log_probs(stored[0][:1]).shape[-1]
    first = 0
    while first < len(documents):
        # as many as are held at once
        rows, last = 0, first
        while last < len(documents) and (last == first or rows * vocabulary < LOGITS_AT_A_TIME):
            rows, last = rows + len(documents[last].tokens), last + 1
        p, q = (runner.log_probs(torch.cat([x[:-1] for x in of[first:last]])) for of in (exact, stored))
        lengths = [len(document.tokens) - 1 for document in documents[first:last]]
        kld += (p.exp() * (p - q)).sum(-1, dtype=torch.float64).cpu().split(lengths)
        for document, own, other in zip(documents[first:last], p.split(lengths), q.split(lengths), strict=True):
            comes = torch.tensor(document.tokens[document.context :], device=p.device)
            own, other = own[document.context - 1 :], other[document.context - 1 :]
            changes.append(float((other - own).gather(1, comes[:, None]).sum()))
            before.append(bool((own.argmax(1) == comes).all()))
            after.append(bool((other.argmax(1) == comes).all()))
        first = last
    change = torch.tensor(changes, dtype=torch.float64)
    position = torch.cat([torch.arange(len(x)) for x in kld])
    moved = torch.cat(kld)
    by = {f"{a}-{b}": float(moved[(position >= a) & (position < b)].mean()) for a, b in pairwise(BOUNDS)}
    flips = list(zip(before, after, strict=True))
    return {
        "change": float(change.mean()),
        "stderr": float(change.std() / len(change) ** 0.5),
        "right": sum(after),
        "lost": flips.count((True, False)),
        "gained": flips.count((False, True)),
        "kld": float(moved.mean()),
        "kld_by_position": by,
    }


def first_keys(loaded: TransformersModel, runner: TransformersRunner, documents: list[Document]) -> dict[str, float]:
    """The share of attention on the first token, and what keys are there and at another position.

    Means over layers and heads, of the exact cache. alike: the cosine of two documents' keys. centred: a key's length
    with the mean of the later keys taken off, over its length.
    """
    found: list[tuple[int, Tensor, Tensor, float]] = []

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scaling: float) -> None:
        found.append((layer, q.float().cpu(), k.float().cpu(), scaling))

    shares: list[float] = []
    keys: dict[tuple[int, int], list[Tensor]] = {}
    means: dict[int, list[Tensor]] = {}
    with observed(keep):
        for document in documents:
            runner.hidden_states([document.tokens])
            for layer, q, k, scaling in found:
                if loaded.windows[layer] is None:
                    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scaling
                    places = torch.arange(len(k))
                    weights = scores.masked_fill(places > places[:, None], -torch.inf).softmax(-1)
                    shares.append(float(weights[:, SETTLED:, 0].mean()))
                for place in (0, SETTLED):
                    keys.setdefault((layer, place), []).append(k[place])
                means.setdefault(layer, []).append(k[SETTLED:].mean(0))
            found.clear()

    def alike(place: int) -> float:
        each = []
        for (_, at), rows in keys.items():
            if at == place:
                unit = torch.nn.functional.normalize(torch.stack(rows).transpose(0, 1), dim=-1)  # [HKV, documents, D]
                cosines = unit @ unit.mT
                pairs = ~torch.eye(len(rows), dtype=torch.bool)
                each.append(float(cosines[:, pairs].mean()))
        return sum(each) / len(each)

    def centred(place: int) -> float:
        each = []
        for layer, of_documents in means.items():
            rows, mean = torch.stack(keys[layer, place]), torch.stack(of_documents).mean(0)
            each.append(float(((rows - mean).norm(dim=-1) / rows.norm(dim=-1)).mean()))
        return sum(each) / len(each)

    found_there = {"attended": sum(shares) / len(shares)}
    for name, at in (("", 0), (f"_at_{SETTLED}", SETTLED)):
        found_there |= {f"alike{name}": alike(at), f"centred{name}": centred(at)}
    return found_there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=512)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--dtype", default="int4_per_token_head")
    parser.add_argument("--mixed", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    compute = "float32" if given.device == "cpu" else "bfloat16"
    loaded = TransformersModel.load(catalog.resolve(given.model), compute, given.device)
    documents = documents_of(given.rows, loaded.tokenizer, given.documents)
    baseline = loaded.runner(Scheme.parse("auto"), attention="reference")
    exact = baseline.hidden_states([document.tokens for document in documents])
    facts = {"model": given.model, "compute_dtype": compute, "device": given.device, "torch": torch.__version__}
    facts |= {
        "dtype": given.dtype,
        "mixed": given.mixed,
        "documents": len(documents),
        "tokens": sum(len(d.tokens) for d in documents),
    }
    first = first_keys(loaded, baseline, documents[:LOOKED_AT])
    longest = max(len(document.tokens) for document in documents)
    learned: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    kinds: dict[str, dict[str, Any]] = {keys: {} for keys in KEYS if keys != "mixed"}
    if given.mixed is not None:
        behind = {"dtype": given.dtype, "rotation": KEYS["center_constant"] + TURN}
        kinds["mixed"] = {"layers": {f"{given.mixed}-{len(loaded.info.layers) - 1}": {"key": behind}}}
    given.out.write_text(json.dumps({**facts, "first": first, "rows": rows}, indent=1) + "\n")
    for draw in range(given.draws):
        for keys, layers in kinds.items():
            for part, scheme in schemes(given.dtype, keys, layers, draw, longest):
                if scheme.learns and keys not in learned:
                    learned[keys] = loaded.learn(scheme)
                runner = loaded.runner(scheme, attention="reference", learned=learned.get(keys))
                rows.append({"keys": keys, "draw": draw, "part": part, **measured(runner, exact, documents)})
                row = rows[-1]
                change = f"{row['change']:+.4f} ± {row['stderr']:.4f}  −{row['lost']} +{row['gained']}"
                print(f"{keys:16} {draw} {part:6} {change}  {row['kld']:.4f}", flush=True)
                given.out.write_text(json.dumps({**facts, "first": first, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
