"""Whether this runner over an exact cache is the model as transformers runs it: asked before a model's first cell.

Seeded random prompts go both ways: through the pages of an exact cache, and through transformers' own attention, one
sequence a pass. An architecture that runs need not be one that is right, and no list of names can keep up with them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbench.cache import OutOfPages
from kvbench.faults import is_the_machine_s
from kvbench.runners.base import GenerateRequest
from kvbench.runners.model_files import RefusedError, one_line
from kvbench.runners.processors import Processors
from kvbench.runners.rope import Frequencies
from kvbench.runners.transformers import Attention, TransformersModel, TransformersRunner
from kvbench.schemes import Scheme

SEED = 0
SHORT = 24  # tokens of the shortest prompt
COMPARED = 64  # last positions of a prompt
BEHIND = 16  # tokens after a window's first is out of reach
MADE = 8  # tokens
LIKELIEST = 8  # tokens whose log-probabilities are compared, at each position
LONGEST = {"cpu": 1024, "cuda": 4608}  # tokens of a prompt at most, where a window asks for more

# of the deviations of a part's positions this quantile counts: a single expert chosen otherwise is no fault
QUANTILE = 0.75
TIMES_NOISE = 3.0
FLOAT32_FLOOR = 1e-3  # nats: far above float32's rounding, far below what a wrong mask does
MOST = {torch.float32: 1e-2, torch.float64: 1e-2, torch.float16: 0.25, torch.bfloat16: 0.75}  # nats: no more is noise


@dataclass(frozen=True)
class Agreement:
    """What the comparison found. All differences are of log-probabilities, in nats.

    largest: over all positions and their likeliest tokens. noise: the same of transformers against itself.
    typical, tolerance: of the part that came nearest to its tolerance; typical: three quarters of its positions differ
    less. tokens: positions compared. unreached: windows that no prompt was longer than.
    """

    largest: float
    noise: float
    typical: float
    tolerance: float
    tokens: int
    unreached: tuple[int, ...]
    seconds: float


def check(loaded: TransformersModel, *, page_size: int = 16, attention: Attention = "auto") -> Agreement:
    """How well the model under an exact cache agrees with itself as transformers runs it.

    Raises:
        RefusedError: it doesn't, or gives numbers that are not finite; the message says where.
    """
    began = time.perf_counter()
    prompts, name = _Prompts.of(loaded), loaded.info.name
    try:
        parts = list(_parts(loaded, prompts, page_size, attention))
        noise = _noise(loaded.model, prompts)
    except (RefusedError, OutOfPages):
        raise
    except Exception as error:  # what an architecture has beside attention may fail anywhere
        if is_the_machine_s(error):
            raise
        raise RefusedError(f"model {name} can't run on this cache: {one_line(error)}") from error
    usual = max(_typical(way) for way in noise)
    floor = FLOAT32_FLOOR if loaded.model.dtype.itemsize >= 4 else 8 * torch.finfo(loaded.model.dtype).eps
    tolerance = max(TIMES_NOISE * usual, floor)
    most = MOST[loaded.model.dtype]
    if not tolerance <= most:
        raise RefusedError(
            f"model {name}: transformers' own ways of attention differ by {usual:.2g} nats in "
            f"{loaded.info.compute_dtype}, so nothing can be held against it: take another compute_dtype"
        )
    typical = {what: _typical(differences) for what, differences in parts}
    for what, value in typical.items():
        if not value <= tolerance:
            raise RefusedError(
                f"model {name}: with an exact cache this runner is not the model: {what}, log-probabilities differ by "
                f"{value:.2g} nats from transformers', whose own noise is {usual:.2g}: this architecture "
                f"can't be measured"
            )
    return Agreement(
        largest=max(float(differences.max()) for _, differences in parts),
        noise=max(float(way.max()) for way in noise),
        typical=max(typical.values()),
        tolerance=tolerance,
        tokens=sum(len(differences) for _, differences in parts),
        unreached=prompts.unreached,
        seconds=round(time.perf_counter() - began, 3),
    )


@dataclass(frozen=True)
class _Prompts:
    """Token ids. `long` reaches behind every window that it can; `forked` begins as it does; `short` follows it."""

    long: list[int]
    forked: list[int]
    short: list[int]
    window: int | None
    unreached: tuple[int, ...]

    @classmethod
    def of(cls, loaded: TransformersModel) -> _Prompts:
        windows = sorted({window for window in loaded.windows.values() if window is not None})
        positions = loaded.info.max_length - MADE
        most = min(LONGEST[loaded.model.device.type], positions)
        reached = [window for window in windows if window + BEHIND <= most]
        length = min(max([2 * SHORT, *(window + BEHIND for window in reached)]), positions)
        vocabulary = min(len(loaded.tokenizer), loaded.model.get_input_embeddings().num_embeddings)
        special = {*(getattr(loaded.tokenizer, "all_special_ids", None) or ())}
        draw = torch.Generator().manual_seed(SEED)
        usual = torch.tensor([token for token in range(vocabulary) if token not in special] or [0])

        def tokens(count: int) -> list[int]:
            found: list[int] = usual[torch.randint(len(usual), (count,), generator=draw)].tolist()
            return found

        long = tokens(length)
        forked = long[: length // 2][:SHORT] + tokens(min(SHORT, length // 2))
        unreached = tuple(window for window in windows if window not in reached)
        return cls(long, forked, tokens(min(SHORT, length)), reached[-1] if reached else None, unreached)


def _parts(
    loaded: TransformersModel, prompts: _Prompts, page_size: int, attention: Attention
) -> Iterator[tuple[str, Tensor]]:
    """What is compared, in words, and its differences by position."""
    exact = Scheme.parse("auto")
    runner = loaded.runner(exact, page_size=page_size, attention=attention)
    plain = {
        "long": _plain(loaded.model, prompts.long),
        "forked": _plain(loaded.model, prompts.forked),
        "short": _plain(loaded.model, prompts.short),
    }
    for rows in plain.values():
        if not bool(rows.isfinite().all()):
            raise RefusedError(
                f"model {loaded.info.name}: its logits are not finite in {loaded.info.compute_dtype}: its weights are "
                f"damaged, or it needs another compute_dtype"
            )
    # the prompt's last tokens one by one, as decoding does, where sequences need not run alone
    stepwise = 0 if runner.alone else min(MADE, len(prompts.long) - 1)
    begun = [prompts.long[: len(prompts.long) - left] for left in range(stepwise, 0, -1)]
    *_, long, forked = runner.hidden_states([*begun, prompts.long, prompts.forked], shared=True)
    differences = _differences(runner, long, plain["long"])
    behind = 0 if prompts.window is None else BEHIND
    whole = len(differences) - max(behind, stepwise)
    yield "in one prompt", differences[:whole]
    if behind:
        yield f"behind a window of {prompts.window} tokens", differences[-behind:]
    if stepwise:
        yield "decoded token by token", differences[-stepwise:]
    yield "after a prefix that two requests share", _differences(runner, forked, plain["forked"])[-SHORT:]
    (short,) = runner.hidden_states([prompts.short], shared=True)
    yield "in a short request after a long one", _differences(runner, short, plain["short"])
    if not stepwise:
        steps = loaded.runner(exact, page_size=page_size, attention=attention, scoring="replay")
        (short,) = steps.hidden_states([prompts.short])
        stepped = _plain_steps(loaded.model, prompts.short) if runner.rope_moves else plain["short"]
        yield "decoded token by token", _differences(runner, short, stepped)

    # where frequencies move, one pass over an answer is not its steps; and a model's settings may change greedy answers
    if runner.rope_moves or Processors(loaded.model):
        return
    made = list(runner.generate([GenerateRequest(tuple(prompts.short), MADE)])[0].tokens)
    if made:
        rows = _plain(loaded.model, prompts.short + made[:-1])[-len(made) :]
        chosen = rows[torch.arange(len(made)), torch.tensor(made, device=rows.device)]
        yield "in an answer", rows.max(-1).values - chosen


def _differences(runner: TransformersRunner, hidden: Tensor, plain: Tensor) -> Tensor:
    """For each of the last positions, the mean over the likeliest tokens of how far their log-probabilities differ."""
    ours = runner.log_probs(hidden[-len(plain) :])
    top = plain.topk(min(LIKELIEST, plain.shape[-1]), dim=-1)
    difference: Tensor = (ours.gather(-1, top.indices) - top.values).abs().mean(-1)
    return difference.nan_to_num(nan=torch.inf)


def _typical(differences: Tensor) -> float:
    """What most positions differ by at most."""
    value = differences.float().nan_to_num(nan=torch.inf).sort().values[int(QUANTILE * (len(differences) - 1))]
    return float(value)


def _noise(model: Any, prompts: _Prompts) -> list[Tensor]:
    """How far transformers' own ways of computing differ, by position: in another batch, and by eager attention."""
    ways: list[list[Tensor]] = [[], []]
    for tokens in (prompts.long[: 2 * SHORT], prompts.short):
        rows = _plain(model, tokens)
        top = rows.topk(min(LIKELIEST, rows.shape[-1]), dim=-1)
        for found, other in zip(ways, (_plain(model, tokens, copies=2), *_eager(model, tokens)), strict=False):
            found.append((other.gather(-1, top.indices) - top.values).abs().mean(-1))
    return [torch.cat(found) for found in ways if found]


@torch.inference_mode()
def _plain(model: Any, tokens: Sequence[int], copies: int = 1) -> Tensor:
    """[positions, vocabulary] log-probabilities after the last tokens, as transformers computes them in one pass."""
    ids = torch.tensor([list(tokens)] * copies, device=model.device)
    with _alone(model):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=COMPARED).logits
    rows: Tensor = logits[0, -COMPARED:].float().log_softmax(-1)
    return rows


def _eager(model: Any, tokens: Sequence[int]) -> Iterator[Tensor]:
    """The same by eager attention, where that is not what the model has anyway."""
    before = model.config._attn_implementation
    if before == "eager":
        return
    model.set_attn_implementation("eager")
    try:
        yield _plain(model, tokens)
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def _plain_steps(model: Any, tokens: Sequence[int]) -> Tensor:
    """The same, fed token by token into transformers' own cache."""
    rows, cache = [], None
    with _alone(model):
        for token in tokens:
            out = model(input_ids=torch.tensor([[token]], device=model.device), use_cache=True, past_key_values=cache)
            cache = out.past_key_values
            rows.append(out.logits[0, -1].float().log_softmax(-1))
    return torch.stack(rows[-COMPARED:])


@contextmanager
def _alone(model: Any) -> Iterator[None]:
    """The block computes as if nothing had been computed before it."""
    frequencies = Frequencies(model)
    frequencies.reset()
    try:
        yield
    finally:
        frequencies.reset()
