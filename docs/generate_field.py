"""Writes the tables of docs/field.md from the committed records, between its marks: `make docs`; a test compares."""

import json
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from kvbench.measured import read
from kvbench.report.compare import compare
from kvbench.report.verdicts import Comparison
from kvbench.schemes import Scheme

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "field.md"
renewed = runpy.run_path(str(ROOT / "docs" / "renew.py"))["renewed"]
MODELS = {"SmolLM2": "smollm2-135m-instruct", "Gemma": "gemma3-270m", "Qwen": "qwen2.5-coder-1.5b-instruct"}
LAYERS = {"field": ((2, 128),) * 28, "field-cpu": ((4, 64),)}  # of the 1.5B, and one of SmolLM2's
CONTEXTS = {"1k": 1024, "8k": 8192, "32k": 32768}
SIGNS = {"WORSE": " **▼**", "EQUIVALENT": " =", "INCONCLUSIVE": " ?", "BETTER": " **▲**"}
ABSENT = "–"
# where a scheme was asked GSM8K: with the field, all questions with the presets, or, destroyed, the first alone
ASKED = (("field", "gsm8k"), ("schemes", "gsm8k"), ("field", "gsm8k-50"))
# of results/first-token: how keys are centred, and what of a cache is packed
CENTRED = {
    "none": "not centred",
    "center_constant": "one mean",
    "center": "means by page",
    "mixed": "by page in 16 layers, one mean behind",
}
PARTS = {"whole": "all packed", "kept": "all but the first", "alone": "the first alone"}
CPU_METRICS = ("kld", "kld@512-1024", "ppl_ratio", "same_top")

Place = tuple[str, str]  # dtype and rotation, as records have them


def schemes() -> dict[str, Scheme]:
    """The schemes of configs/field.yaml by what the page calls them, without the baseline."""
    listed = yaml.safe_load((ROOT / "configs" / "field.yaml").read_text(encoding="utf-8"))["schemes"]
    return {label(spec): Scheme.of(spec) for spec in listed if spec != "fp16"}


def label(spec: str | Mapping[str, Any]) -> str:
    """`kivi2+w64s4`, or a dtype with centred keys."""
    if isinstance(spec, str):
        return f"`{spec}`"
    window = Scheme.of(spec).window
    name = spec.get("dtype") or spec["scheme"]
    centred = ", centred" if "center" in str(spec.get("rotation")) else ""
    return f"`{name}{'+' + window.label() if window else ''}`{centred}"


def place(scheme: Scheme) -> Place:
    """Where its records are."""
    columns = scheme.columns()
    return columns["dtype"], columns["rotation"]


@cache
def records(folder: str) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """By model, task, dtype and rotation: the metrics of a run's records."""
    found = {}
    for path in (ROOT / "results" / folder / "cells").glob("*/record.json"):
        row = json.loads(path.read_text(encoding="utf-8"))
        found[row["model"]["name"], row["task"], row["dtype"], row["rotation"]] = {m["name"]: m for m in row["metrics"]}
    return found


@cache
def comparisons(folder: str) -> dict[tuple[str, str, str, str, str], Comparison]:
    """By model, task, metric, dtype and rotation: a run's rows of `kvbench compare`."""
    rows = compare(read(ROOT / "results" / folder)).rows
    return {(row.model, row.task, row.metric, row.dtype, row.rotation): row for row in rows}


def bits(scheme: Scheme, folder: str) -> list[str]:
    """Of each context, a 16-bit model's keys and values, tails and first tokens counted."""
    layers = LAYERS[folder]
    values = 2 * sum(heads * width for heads, width in layers)
    return [f"{8 * scheme.nbytes(layers, n, torch.bfloat16) / (n * values):.2f}" for n in CONTEXTS.values()]


def nats(value: float | None) -> str:
    """Three digits, four places at most."""
    return ABSENT if value is None else f"{value:.2f}" if value >= 1 else f"{value:.{3 if value >= 0.1 else 4}f}"


def with_error(metric: Mapping[str, Any]) -> str:
    """Nats with their standard error, to as many places as show it."""
    if "value" not in metric:
        return ABSENT
    value, error = metric["value"], metric["stderr"]
    places = 2 if value >= 1 else 3 if value >= 0.1 else 4 if value >= 0.01 else 5
    return f"{value:.{places}f} ± {error:.{places}f}"


def times(value: float | None) -> str:
    """Of perplexities: the nearer to 1, the more places."""
    return ABSENT if value is None else f"{value:.{0 if value >= 100 else 2 if value >= 1.1 else 3}f}"


def table(head: list[str], rows: list[list[str]], last: str = "---:") -> str:
    """Markdown, the first column to the left, the last as is said."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    marks = [":---", *["---:"] * (len(head) - 2), last]
    return "\n".join([lines[0], f"|{'|'.join(marks)}|", *lines[1:]])


def on_three_models() -> str:
    """Divergence behind 1536 tokens, and perplexity as a multiple."""
    found = records("field")
    rows = []
    for name, scheme in schemes().items():
        own = [found.get((model, "divergence", *place(scheme)), {}) for model in MODELS.values()]
        cells = [with_error(one.get("kld@1536-2048", {})) for one in own]
        cells += [times(one.get("ppl_ratio", {}).get("value")) for one in own]
        rows.append([name, *bits(scheme, "field"), *cells])
    head = ["scheme", "bits: 1k", "8k", "32k", *MODELS, *(f"ppl × {model}" for model in MODELS)]
    return table(head, rows)


def answers() -> str:
    """Needles that were found, GSM8K's share of right answers, and what 16 bits gain or lose beside it."""
    rows = []
    for name, scheme in {"`fp16`": Scheme.parse("fp16"), **schemes()}.items():
        cells = [_share("field", model, "needle", scheme) for model in MODELS.values()]
        cells += _gsm8k(scheme)
        if {*cells} != {ABSENT}:
            rows.append([name, *cells])
    return table(["scheme", *(f"needles: {model}" for model in MODELS), "GSM8K: Qwen", "points beside 16 bits"], rows)


def _gsm8k(scheme: Scheme) -> tuple[str, str]:
    score, model = "exact_match,strict-match", MODELS["Qwen"]
    for folder, task in ASKED:
        if (metrics := records(folder).get((model, task, *place(scheme)))) is None:
            continue
        metric, row = metrics[score], comparisons(folder).get((model, task, score, *place(scheme)))
        share = f"{100 * metric['value']:.1f} % of {metric['n']}{SIGNS.get(row.verdict or '', '') if row else ''}"
        if row is None or row.ci_low is None or row.ci_high is None or row.difference is None:
            return share, ABSENT
        return share, f"{_signed(row.difference)} ({_signed(row.ci_low)} to {_signed(row.ci_high)})"
    return ABSENT, ABSENT


def _signed(share: float) -> str:
    points = f"{100 * share:+.1f}"
    return "0.0" if float(points) == 0 else points.replace("-", "−")


def presets() -> str:
    """LAMBADA's accuracy and the needles found of 80, of each scheme of configs/schemes.yaml on each model."""
    listed = yaml.safe_load((ROOT / "configs" / "schemes.yaml").read_text(encoding="utf-8"))["schemes"]
    rows = []
    for spec in listed:
        scheme = Scheme.of(spec)
        name = f"`{spec}`" if isinstance(spec, str) else "the same, one mean for all positions"
        cells = [
            _share("schemes", model, task, scheme) for task in ("lambada_openai", "needle") for model in MODELS.values()
        ]
        rows.append([name, *cells])
    return table(["scheme", *(f"LAMBADA: {model}" for model in MODELS), *(f"needles: {one}" for one in MODELS)], rows)


def _share(folder: str, model: str, task: str, scheme: Scheme) -> str:
    """A share of right answers with its verdict: of needles the numbers, of others percent."""
    metrics = records(folder).get((model, task, *place(scheme)))
    if metrics is None:
        return ABSENT
    metric, row = metrics["acc"], comparisons(folder).get((model, task, "acc", *place(scheme)))
    sign = SIGNS.get(row.verdict or "", "") if row else ""
    if task == "needle":
        return f"{round(metric['value'] * metric['n'])}/{metric['n']}{sign}"
    return f"{100 * metric['value']:.1f} %{sign}"


def on_a_cpu() -> str:
    """The divergence of one model with its standard error, the later half's, and what a scheme needs."""
    rows = []
    for name, scheme in schemes().items():
        rows += _on_a_cpu(name, scheme)
        dtype, rotation = place(scheme)
        # of a block format, under a Hadamard rotation of both sides too
        if rotation == "none" and name == f"`{dtype}`":
            rows += _on_a_cpu(f"{name}, Hadamard", Scheme.parse(dtype, "hadamard"))
    head = ["scheme", "1k", "8k", "32k bits", "KLD", "later", "ppl ×", "top", "needs beside its rows"]
    return table(head, rows, last=":---")


def _on_a_cpu(name: str, scheme: Scheme) -> list[list[str]]:
    metrics = records("field-cpu").get((MODELS["SmolLM2"], "divergence", *place(scheme)))
    if metrics is None:
        return []
    (mean, later, ratio, top), error = (metrics[key]["value"] for key in CPU_METRICS), metrics["kld"]["stderr"]
    shown = [f"{mean:.{digits(mean)}f} ± {error:.{digits(mean)}f}", f"{later:.{digits(later)}f}"]
    return [[name, *bits(scheme, "field-cpu"), *shown, f"{ratio:.3f}", f"{top:.1f} %", needs(scheme)]]


def digits(value: float) -> int:
    """Places of a divergence: more, the smaller it is."""
    return 5 if value < 0.001 else 4 if value < 0.1 else 3


def needs(scheme: Scheme) -> str:
    """What a scheme keeps or learns beside its rows."""
    window = scheme.window
    recent = 0 if window is None or window.recent is None else window.recent * window.page
    sinks = window.sinks if window else 0
    parts = [
        "a text" if scheme.learns else "",
        f"last {recent} to {recent + window.page - 1} tokens in 16 bits" if window and recent else "",
        f"first {sinks}" + ("" if recent else " in 16 bits") if sinks else "",
    ]
    return ", ".join(filter(None, parts)) or ABSENT


@dataclass(frozen=True)
class Claim:
    """What a paper or a project says of schemes, and when a model bears it out.

    says, theirs: their words and figures, with the source. schemes: as the page calls them. ratio: read by perplexity,
    not by divergence. holds: of a model's values, in the order of schemes. why: what is to be said besides.
    """

    says: str
    theirs: str
    schemes: tuple[str, ...]
    holds: Callable[..., bool]
    why: str
    ratio: bool = False


ARXIV, LLAMA, IK = (
    "https://arxiv.org/abs",
    "https://github.com/ggml-org/llama.cpp/pull",
    "https://github.com/ikawrakow/ik_llama.cpp/pull",
)
CLAIMS = (
    Claim(
        f"llama.cpp: a rotation takes most off what `q4_0` loses ([20995]({LLAMA}/20995), [21038]({LLAMA}/21038))",
        "TinyLlama-1.1B, keys turned at random: × 1.136, turned × 1.041",
        ("`q4_0`", "`llama_cpp_q4_0`"),
        lambda plain, rotated: rotated - 1 < 0.5 * (plain - 1),
        "in size too on SmolLM2, the one of its family; no rotation takes off a bias",
        ratio=True,
    ),
    Claim(
        f"ik_llama.cpp: `iq4_nl` is far nearer than `q4_0`, and rotated little or not ([1547]({IK}/1547))",
        "–",
        ("`q4_0`", "`iq4_nl`", "`llama_cpp_q4_0`", "`llama_cpp_iq4_nl`"),
        lambda q4, iq4, q4_rotated, iq4_rotated: iq4 < 0.8 * q4 and q4_rotated / iq4_rotated < q4 / iq4,
        "",
    ),
    Claim(
        "NVIDIA: NVFP4 loses less than MXFP4 ([blog](https://developer.nvidia.com/blog/introducing-nvfp4-for-efficient-and-accurate-low-precision-inference/))",
        "–",
        ("`nvfp4`", "`mxfp4`"),
        lambda nv, mx: nv < 0.9 * mx,
        "of weights and activations there",
    ),
    Claim(
        "exllamav3: cells' middles err less than a rounded grid ([source](https://github.com/turboderp-org/exllamav3))",
        "some 5 % of a row's error",
        ("`exl3_8bit`", "`llama_cpp_q8_0`", "`q8_0`"),
        lambda cells, rotated, _: cells < rotated,
        "rows: tests/dtypes/test_exl3.py; both rotated here, by 32 channels and by rows",
    ),
    Claim(
        f"KIVI: keys by channel, not by token ([2402.02750]({ARXIV}/2402.02750))",
        "–",
        ("`kivi4`", "`uint4_per_group+w64`", "`kivi2`", "`uint2_per_group+w64`"),
        lambda four, four_rows, two, two_rows: four < 0.5 * four_rows and two < 0.5 * two_rows,
        "behind the same tail",
    ),
    Claim(
        f"KIVI: 2 bits keep almost the same quality ([2402.02750]({ARXIV}/2402.02750))",
        "models of 7B and more",
        ("`kivi2_32`", "`kivi2`", "`int2_per_token_head`"),
        lambda two, *_: two < 1.1,
        "the paper's groups of 32 tokens, and of 64; far nearer than other 2 bits without a text everywhere",
        ratio=True,
    ),
    Claim(
        f"TurboQuant: neutral at 3.5 bits, a marginal loss at 2.5 ([2504.19874]({ARXIV}/2504.19874))",
        "Ollama's port, Llama-3.2-3B: × 1.013, 1.09 and 1.70 at 4, 3 and 2 bits ([15051](https://github.com/ollama/ollama/issues/15051))",
        ("`turboquant4`", "`turboquant3`", "`turboquant2`"),
        lambda four, *_: four < 1.02,
        "the port's ladder, from smaller models; theorem 1's distortion holds (tests/dtypes/test_turboquant.py)",
        ratio=True,
    ),
    Claim(
        f"TurboQuant: a sketch of one bit is better for keys ([2504.19874]({ARXIV}/2504.19874), algorithm 2)",
        "–",
        ("`turboquant4_qjl`", "`turboquant4`"),
        lambda sketch, plain: sketch < plain,
        "right in the mean (tests); the bit is worth more in the codebook, as users of vLLM's found too ([38479](https://github.com/vllm-project/vllm/pull/38479))",
    ),
    Claim(
        f"KVQuant: at 3 bits within .1 of perplexity 5.68 ([2401.18079]({ARXIV}/2401.18079))",
        "LLaMA-7B: × 1.02",
        ("`kvquant3`",),
        lambda three: three < 1.02,
        "without a tail; a model of 1.5B loses less than the small two",
        ratio=True,
    ),
    Claim(
        f"KVQuant: the nearest of 3 bits ([2401.18079]({ARXIV}/2401.18079))",
        "–",
        ("`kvquant3`", "`turboquant3`", "`exl3_3bit`", "`int3_per_token_head`"),
        lambda own, *others: own < min(others),
        "of published ones without a tail",
    ),
    Claim(
        f"SKVQ: nearer than KIVI and KVQuant at 2 bits ([2405.06219]({ARXIV}/2405.06219))",
        "–",
        ("`skvq2`", "`kivi2`", "`kvquant2`"),
        lambda own, *others: own < min(others),
        "with the clip searched for each group; nearer than KIVI over a whole short text, which its longer tail covers",
    ),
)


def claims() -> str:
    """What others say, each model's figures, and on which it holds."""
    found, named = records("field"), schemes()
    rows = []
    for one in CLAIMS:
        cells, yes, no = [], [], []
        for model, name in MODELS.items():
            metric = "ppl_ratio" if one.ratio else "kld@1536-2048"
            rows_of = [found.get((name, "divergence", *place(named[label])), {}) for label in one.schemes]
            values = [row[metric]["value"] if row else None for row in rows_of]
            cells.append(", ".join(map(times if one.ratio else nats, values)))
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                (yes if one.holds(*known) else no).append(model)
        holds = "all three" if len(yes) == 3 else "none" if not yes else " and ".join(yes)
        measured = "" if len(yes + no) == 3 else f", of {len(yes + no)} measured"
        what = f"{', '.join(one.schemes)}: {'× perplexity' if one.ratio else 'KLD'}"
        rows.append([one.says, one.theirs, what, *cells, holds + measured, one.why or ABSENT])
    return table(["claim", "their figures", "here", *MODELS, "holds on", "besides"], rows, last=":---")


def first_token() -> str:
    """What a packed first token does to last words of LAMBADA, by draw of the rotation's signs, and to divergence."""
    rows = []
    for path in sorted((ROOT / "results" / "first-token").glob("*.json"), reverse=True):
        record = json.loads(path.read_text(encoding="utf-8"))
        model = next(short for short, name in MODELS.items() if name == record["model"])
        for keys, shown in CENTRED.items():
            parts = {
                part: [row for row in record["rows"] if (row["keys"], row["part"]) == (keys, part)] for part in PARTS
            }
            if all(parts.values()):
                changes = [", ".join(f"{row['change']:+.3f}" for row in found) for found in parts.values()]
                moved = [nats(sum(row["kld"] for row in found) / len(found)) for found in parts.values()]
                rows.append([f"{model}, {shown}", *(one.replace("-", "−") for one in changes), *moved])
    head = ["int4, keys", *PARTS.values(), *(f"KLD: {shown}" for shown in PARTS.values())]
    return table(head, rows)


def sinks() -> str:
    """LAMBADA's accuracy and the divergence behind 1536 tokens, of each scheme of configs/sinks.yaml on each model."""
    rows = []
    for spec in yaml.safe_load((ROOT / "configs" / "sinks.yaml").read_text(encoding="utf-8"))["schemes"][1:]:
        scheme = Scheme.of(spec)
        name = spec if isinstance(spec, str) else spec.get("scheme") or f"{spec['dtype']}_per_token_head"
        kept = scheme.window.sinks if scheme.window else 0
        cells = [_share("sinks", model, "lambada_openai", scheme) for model in MODELS.values()]
        own = [records("sinks").get((model, "divergence", *place(scheme)), {}) for model in MODELS.values()]
        rows.append([f"`{name}`", str(kept), *cells, *(with_error(one.get("kld@1536-2048", {})) for one in own)])
    head = ["scheme", "kept", *(f"LAMBADA: {model}" for model in MODELS), *(f"KLD: {model}" for model in MODELS)]
    return table(head, rows)


TABLES = {
    "three models": on_three_models,
    "answers": answers,
    "presets": presets,
    "first token": first_token,
    "sinks": sinks,
    "claims": claims,
    "a cpu": on_a_cpu,
}


def page() -> str:
    """docs/field.md with its tables made anew."""
    made: str = renewed(PAGE, TABLES)
    return made


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
