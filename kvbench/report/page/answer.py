"""The answer of a sweep in sentences, and what a reader must know before the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from kvbench.render import Prose
from kvbench.report.comparison_text import shown_count
from kvbench.report.page.found import BITS_AT, Found, Scheme, difference_and_interval
from kvbench.report.verdicts import Comparison
from kvbench.results import Record, shown_number

# of these architectures the key projection has a bias, which records did not say at first
BIASED_KEYS = ("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl")
# what settles the others where schemes are of one size
ORDER = ("WORSE", "INVALID", "INCONCLUSIVE")


def answer(found: Found) -> Prose:
    """Which is the smallest cache that loses nothing, what it saves, what is uncertain, what the next one costs."""
    lines: list[str] = []
    for model in found.models:
        told = list(_model(found, model))
        lines += [f"{model}: {line}" for line in told] if len(found.models) > 1 else told
    question = "How small can this model's KV cache be before it loses something?"
    title = question if len(found.models) == 1 else question.replace("this model's", "each model's")
    return Prose(title, lines, leads=True)


def chosen(found: Found, model: str) -> Scheme | None:
    """The smallest scheme of a model that is WORSE in nothing, EQUIVALENT in all if there is one; else none."""
    smaller = _whole(_smaller(found, model))
    sure = [one for one in smaller if len(one.having("EQUIVALENT")) == len(_told(one))]
    unharmed = [one for one in smaller if not one.having("WORSE", "INVALID")]
    return min(sure or unharmed, key=_rank, default=None)


def _whole(schemes: Sequence[Scheme]) -> list[Scheme]:
    """Those of the schemes that were compared on as much as any: what was asked less may only seem to lose less."""
    most = max((len(one.rows) for one in schemes), default=0)
    return [one for one in schemes if len(one.rows) == most]


def _rank(one: Scheme) -> tuple[float, ...]:
    return (one.bits or 0.0, *(float(len(one.having(verdict))) for verdict in ORDER), -float(len(one.rows)))


def _told(one: Scheme) -> list[Comparison]:
    """The comparisons that could show a loss."""
    return [row for row in one.rows if row.verdict != "NOT-DISCRIMINATIVE"]


def _smaller(found: Found, model: str) -> list[Scheme]:
    """The schemes of fewer bits than the baseline, with the comparisons that count."""
    base, rounded = found.baseline(model), _rounded(found, model)
    return [
        counted
        for one in found.schemes
        if one.model == model and one.bits and base and base.bits and one.bits < base.bits
        for counted in [replace(one, rows=[row for row in one.rows if (row.task, row.metric) not in rounded])]
        if _told(counted)
    ]


def _rounded(found: Found, model: str) -> list[tuple[str, str]]:
    """Tasks and metrics in which an exact cache under a rotation is WORSE too: the model's own rounding moves them."""
    base = found.baseline(model)
    exact = [one for one in found.schemes if one.model == model and base and (one.bits or 0) >= (base.bits or 0)]
    return list(dict.fromkeys((row.task, row.metric) for one in exact for row in one.having("WORSE")))


def _model(found: Found, model: str) -> Iterator[str]:
    base, smaller = found.baseline(model), _smaller(found, model)
    if base is None or not smaller:
        yield "Answer: none yet, for no cache smaller than the baseline was compared with it."
        return
    best = chosen(found, model)
    whole = _whole(smaller)
    partly = [one for one in smaller if one not in whole]
    among = f"Of the {len(whole)} schemes measured on most, " if len(whole) > 1 else "Of what was measured on most, "
    among = among.replace("on most", "on every task") if not any(_unmeasured(found, one) for one in whole) else among
    if best is None:
        best = min(whole, key=lambda one: (len(one.having("WORSE")), _rank(one)))
        none = (
            f"{among}none is without a measurable loss: each is WORSE than {base.name} in something."
            if partly
            else f"None without a measurable loss: every cache smaller than {base.name} is WORSE in something."
        )
        line = (
            f"{none} Nearest comes {best.name} ({_bits(best)}): {_counts(best)} of {len(best.rows)} comparisons"
            f"{_overlap(found, best)}. "
            f"WORSE in {_listed(found, best.having('WORSE', 'INVALID'), 3)}."
        )
    elif len(best.having("EQUIVALENT")) == len(_told(best)):
        line = (
            f"{among if partly else ''}{'the' if partly else 'The'} smallest cache without a measurable loss is "
            f"{best.name}, with {_bits(best)}: EQUIVALENT to "
            f"{base.name} in all {len(_told(best))} comparisons that could tell."
        )
    else:
        line = (
            f"{among if partly else ''}{'the' if partly else 'The'} smallest cache without a measurable loss is "
            f"{best.name}, with {_bits(best)}: WORSE than {base.name} in none of {len(best.rows)} comparisons"
            f"{_overlap(found, best)}, but not EQUIVALENT in all ({_counts(best)})."
        )
    if rounded := _rounded(found, model):
        names = ", ".join(" ".join(place) for place in rounded)
        line += f" Left out: {names}, where an exact cache under a rotation is WORSE too, by rounding alone."
    yield f"Answer: {line[0].lower()}{line[1:]}"
    if partly:
        yield _left_out(found, partly)
    yield _saving(found, best, base)
    yield _doubt(found, best)
    below = [one for one in smaller if (one.bits or 0) < 0.75 * (best.bits or 0) and one.having("WORSE")]
    if below:
        size = max(one.bits or 0 for one in below)
        gentle = min((one for one in below if one.bits == size), key=lambda one: len(one.having("WORSE")))
        lost = gentle.having("WORSE")
        shares = [row for row in lost if row.unit == "share"] or lost
        yield (
            f"Next size down: {gentle.name} ({_bits(gentle)}) is WORSE in {len(lost)} of "
            f"{len(gentle.rows)} comparisons: {_listed(found, shares, 4, len(lost))}."
        )


def _overlap(found: Found, one: Scheme) -> str:
    """Where several metrics or lengths of a task count each, on how many tasks they are."""
    tasks = len({found.task(row) for row in one.rows})
    noun = f"{tasks} tasks" if tasks > 1 else "one task"
    return f" on {noun} (a task's metrics and lengths overlap, and count one each)" if tasks < len(one.rows) else ""


def _left_out(found: Found, partly: Sequence[Scheme]) -> str:
    """Which schemes were measured on fewer tasks, and how the best of them looks on what it has."""
    names: dict[str, list[str]] = {}
    for one in partly:
        names.setdefault(one.dtype, []).append(one.rotation)
    told = "; ".join(
        dtype if rotations == ["none"] else f"{dtype} · {', '.join(rotations)}" for dtype, rotations in names.items()
    )
    best = min(partly, key=lambda one: (len(one.having("WORSE", "INVALID")) / len(one.rows), one.bits or 0.0))
    tasks = ", ".join(dict.fromkeys(found.task(row) for row in best.rows))
    return (
        f"Left out, as measured on fewer tasks: {told}. Of these {best.name} ({_bits(best)}) looks best on what it "
        f"has: {_counts(best)} in {tasks}."
    )


def _listed(found: Found, rows: Sequence[Comparison], most: int, of: int | None = None) -> str:
    """The first metric of each task with its difference, as many as there is room for. of: all that there are."""
    whole = [row for row in rows if "@" not in row.metric] or list(rows)
    first = list({found.task(row): row for row in reversed(whole)}.values())[::-1]
    named = "; ".join(
        f"{found.task(row)} {row.metric} {_levels(row)}{difference_and_interval(row)}{_sure(row)}"
        for row in first[:most]
    )
    left = (len(rows) if of is None else of) - len(first[:most])
    return named + (f"; and {left} more" if left else "")


def _levels(row: Comparison) -> str:
    """Between which shares a difference lies, `from 42.1 % to 0.0 %, `: what is lost of how much."""
    if row.unit != "share" or row.baseline is None or row.value is None:
        return ""
    return f"from {100 * row.baseline:.1f} % to {100 * row.value:.1f} %, "


def _bits(one: Scheme) -> str:
    return f"{one.bits:.2f} bits a value"


def _sure(row: Comparison) -> str:
    if row.p_holm is None:
        return ""
    return f" (p {f'= {row.p_holm:.1g}' if row.p_holm else '< 1e-300'})"


def _counts(one: Scheme) -> str:
    verdicts = ("EQUIVALENT", "BETTER", "WORSE", "INCONCLUSIVE", "NOT-DISCRIMINATIVE", "INVALID")
    return ", ".join(f"{len(rows)} {verdict}" for verdict in verdicts if (rows := one.having(verdict)))


def _saving(found: Found, best: Scheme, base: Scheme) -> str:
    if not (best.bytes_per_token and base.bytes_per_token):
        return f"Size: it saves {(base.bits or 0) / (best.bits or 1):.2f} × of the cache."
    tokens = found.longest or BITS_AT
    sizes = [one.size(tokens) for one in (best, base)]
    each = [f"{size / tokens / 1024:.1f}" for size in sizes]
    return (
        f"Size: {best.name} takes {sizes[0] / 2**20:.0f} MiB in place of {sizes[1] / 2**20:.0f} for one sequence of "
        f"{tokens} tokens, {each[0]} KiB a token in place of {each[1]}: {sizes[1] / sizes[0]:.2f} × smaller."
    )


def _doubt(found: Found, best: Scheme) -> str:
    """What is open of a scheme, and how much moves by chance."""
    undecided = best.having("INCONCLUSIVE")
    parts = []
    if undecided:
        # parts of a task last, then the best measured
        rows = sorted(undecided, key=lambda row: ("@" in row.metric, -(row.n or 0)))
        named = "; ".join(
            f"{found.task(row)} {row.metric} {difference_and_interval(row)}"
            + (f" would need {shown_count(row.n_to_decide)} documents and has {row.n}" if row.n_to_decide else "")
            for row in rows[:2]
        )
        more = f", and {len(rows) - 2} more" if len(rows) > 2 else ""
        family = len(found.comparisons.family)
        apart = any(row.p_holm is not None and (row.ci_low or 0) * (row.ci_high or 0) > 0 for row in rows[:2])
        why = f" (verdicts are corrected for {family} comparisons by Holm, intervals are not)" if apart else ""
        parts.append(f"{len(undecided)} of its comparisons could not be decided: {named}{more}{why}")
    missing = _unmeasured(found, best)
    if missing:
        parts.append(f"it was not measured on {', '.join(missing)}")
    noise = [row for row in found.comparisons.again if row.model == best.model and row.dtype == "again" and row.n]
    flips = [row for row in noise if row.unit == "share"]
    if flips:
        most = max(flips, key=lambda row: ((row.worse or 0) + (row.better or 0)) / (row.n or 1))
        moved = (most.worse or 0) + (most.better or 0)
        parts.append(
            f"the baseline measured again flips {moved} of {most.n} answers of {found.task(most)} {most.metric}"
        )
    return f"Uncertain: {'; '.join(parts)}." if parts else "Uncertain: nothing at this margin."


def _unmeasured(found: Found, best: Scheme) -> list[str]:
    everything = dict.fromkeys(found.task(row) for row in found.rows if row.model == best.model)
    own = {found.task(row) for row in best.rows}
    return [task for task in everything if task not in own]


# ---- warnings


def cautions(found: Found, progress: str = "") -> Prose | None:
    """What the numbers hide; None where that is nothing. progress: of a sweep that is not whole."""
    done = [record for record in found.records if record.status == "done" and not record.kernel]
    lines = [*([progress] if progress else []), *_biased(done), *_fixed_scale(done), *_peak(done)]
    return Prose("Before you read the numbers", lines) if lines else None


def _biased(records: Sequence[Record]) -> Iterator[str]:
    uncentred: dict[str, dict[str, None]] = {}
    for record in records:
        extra = record.model.get("extra") or {}
        biased = extra.get("key_bias", extra.get("model_type") in BIASED_KEYS)
        plain = record.bits_per_value and record.bits_per_value < 16 and not record.canary and not record.again
        if biased and plain and "center" not in record.rotation.partition(":")[0]:
            uncentred.setdefault(record.model["name"], {})[record.dtype] = None
    for model, dtypes in uncentred.items():
        yield (
            f"Keys of {model} have a bias, a constant in each channel. Softmax cancels it, but a dtype spends its "
            f"range on it unless it is subtracted first (`center`), and {', '.join(dtypes)} here did not subtract it. "
            "`kvbench ls schemes` has presets that do; `kvbench doctor --keys MODEL` shows the bias."
        )


def _fixed_scale(records: Sequence[Record]) -> Iterator[str]:
    if any("fp8_per_tensor" in record.dtype for record in records):
        yield (
            "fp8_per_tensor runs with its scale fixed at 1.0, as engines do without calibration: keys and values "
            "beyond 448 are cut off."
        )


def _peak(records: Sequence[Record]) -> Iterator[str]:
    peaks = [one.timings["peak_memory_bytes"] for one in records if one.timings.get("peak_memory_bytes")]
    if peaks:
        yield (
            "Peak memory is the allocator's, with weights and activations, over batches that were chosen to fill the "
            f"GPU: here up to {shown_number(max(peaks) / 2**30)} GiB. What a cache saves is its bytes a token."
        )
