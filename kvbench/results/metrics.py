"""What a number of a task is, by its own account, and how it is shown. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["share", "mean", "log", "distance"]


@dataclass(frozen=True)
class Metric:
    """One number of a task, and what it is: nobody guesses that from its name or from the values of a cell.

    name: such as "acc" or "exact_match,strict-match"; stderr: its standard error, None where there is none.
    n: documents behind it. unit: "" for a plain ratio, else such as "nats", "ppl", "%".
    kind: what it is the mean of over documents. "share": scores within 0..1, such as right or wrong; "log": the
    logarithm, whose mean's exponential it is (a perplexity); "distance": from the sweep's baseline, which has none from
    itself by definition; "mean": any other number. None: it is no mean over documents, and is not compared.
    weight: the samples' column that says what a document counts for; None where all count alike.
    when_zeroed: what it must do where the cache is destroyed; None where it tells nothing of the cache.
    headline: a table has room for it. Others stand where everything is shown.
    """

    name: str
    value: float
    stderr: float | None
    n: int
    unit: str = ""
    higher_is_better: bool | None = None
    kind: Kind | None = None
    weight: str | None = None
    when_zeroed: Literal["falls", "rises"] | None = None
    headline: bool = True


def headline(metrics: Sequence[Metric]) -> list[Metric]:
    """The metrics of a task that a table has room for: where none says so, all."""
    return [metric for metric in metrics if metric.headline] or list(metrics)


def exponential(log: float) -> float:
    """exp(log); infinite where that is beyond every float."""
    try:
        return math.exp(log)
    except OverflowError:
        return math.inf


# ---- lm-eval's, which it describes by name alone

_SHARE = {"kind": "share", "when_zeroed": "falls"}
_PERPLEXITY = {"unit": "ppl", "kind": "log", "when_zeroed": "rises"}
LM_EVAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"), _SHARE),
    "perplexity": _PERPLEXITY,
    "word_perplexity": {**_PERPLEXITY, "weight": "word_perplexity.weight"},
    "byte_perplexity": {**_PERPLEXITY, "weight": "byte_perplexity.weight", "headline": False},
    "bits_per_byte": {"unit": "bits", "headline": False},  # says what byte_perplexity does
}


def of_lm_eval(name: str, higher_is_better: bool | None) -> dict[str, Any]:
    """What one of lm-eval's metrics is, as fields of `Metric`; of a task's own metric only that it is a mean.

    RULER's are named by a length; each is the share of the answers that are in the text.
    """
    own = {"kind": "mean", "when_zeroed": "falls" if higher_is_better else None}
    return LM_EVAL.get(name) or (_SHARE if name.isdecimal() else own)


# ---- records of version 1, whose metrics said nothing of themselves

_V1: dict[str, dict[str, Any]] = {
    "kld": {"kind": "distance", "weight": "tokens", "when_zeroed": "rises"},
    "same_top": {"kind": "distance", "weight": "tokens", "when_zeroed": "falls"},
    "ppl_ratio": {"kind": "log", "weight": "tokens", "when_zeroed": "rises"},
    "delta_p": {"kind": "mean", "weight": "tokens", "headline": False},
    "ppl": {},
    **{name: {"headline": False} for name in ("rms_delta_p", "ppl_baseline")},
    **{name: {} for name in ("us", "rel_error", "speedup", "prefill", "decode", "memory_holds", "longest_context")},
}


def upgrade(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The metrics of a record of version 1 as version 2 has them: what their names meant then, said."""
    grouped = any("/" not in row["name"] for row in rows)
    upgraded = []
    for row in rows:
        leaf, _, name = row["name"].rpartition("/")
        name = re.split("[,@]", name)[0]
        if name.startswith("kld_"):  # a percentile, or the maximum
            known: dict[str, Any] = {"headline": False}
        else:
            known = _V1.get(name) or ({} if name in _V1 else of_lm_eval(name, row["higher_is_better"]))
        # a group's own numbers stand for those of its tasks
        upgraded.append({**row, **known, **({"headline": False} if leaf and grouped else {}), "unit": row["unit"]})
    return upgraded


# ---- shown


def shown_metric(metric: Metric) -> str:
    """`0.889 ± 0.009`: the standard error to one digit (two where that is a 1), the value to the same place."""
    value, stderr = metric.value, metric.stderr
    unit = " %" if metric.unit == "%" else ""
    if not math.isfinite(value):
        return str(value)
    if stderr is None or not math.isfinite(stderr) or stderr == 0:
        return f"{shown_number(value)}{unit}"
    exponent = math.floor(math.log10(stderr))
    digits = -exponent + (1 if f"{stderr:.1e}"[0] == "1" else 0)
    if (digits > 5 and abs(value) < 0.1) or exponent > 3:
        return f"{value:.1e} ± {stderr:.0e}{unit}"
    places = max(0, digits)
    return f"{value:.{places}f} ± {stderr:.{places}f}{unit}"


def shown_number(value: float) -> str:
    """A number to four digits; a whole one as it is."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e7:
        return f"{value:.2e}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def shown_megabytes(nbytes: int) -> str:
    """Bytes as MB (1e6): to a tenth, and below that to three digits, so that what was read is never 0.0."""
    megabytes = nbytes / 1e6
    return f"{megabytes:.1f}" if megabytes >= 0.1 else f"{megabytes:.3g}"
