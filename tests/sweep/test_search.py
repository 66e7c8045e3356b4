"""The search over keys, values and layers: what it chooses, what it measures, and what it says of that."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from typer.testing import CliRunner

from kvbench.cli import app
from kvbench.results import Store
from kvbench.runners.base import ModelInfo
from kvbench.runners.toy import ToyRunner
from kvbench.runners.transformers import TransformersModel
from kvbench.schemes import Scheme
from kvbench.sweep.command import Options, run_sweep
from kvbench.sweep.parts import ModelFacts, Parts
from kvbench.sweep.search.choices import Problem, families
from kvbench.sweep.search.command import Request, run_search
from kvbench.sweep.search.solve import Slot, cheapest
from kvbench.tasks import RunContext, make_task
from kvbench.yaml_text import ConfigError

LAYERS = ((1, 16),) * 4
WEIGHTS = (1.0, 0.01, 0.01, 0.3)  # what noise in a layer's keys does; in its values a tenth of that
ERRORS = {32: 0.0, 16: 0.0, 8: 1e-4, 4: 0.02, 2: 0.3}  # of codes of so many bits


# ---- a model whose layers matter as they are told to


def noise(scheme: Scheme) -> float:
    """Root of the sum over layers of what their codes lose."""
    total = 0.0
    seen = 0.5 if scheme.window else 1.0  # half of the keys are read in 16 bits
    for index, weight in enumerate(WEIGHTS):
        key, value = scheme.resolve(torch.float32).layer(index, len(LAYERS))
        total += seen * weight * (ERRORS[key.dtype.code_bits] + 0.1 * ERRORS[value.dtype.code_bits])
    return total**0.5


class Runner(ToyRunner):
    def __init__(self, scheme: Scheme, destroyed: bool) -> None:
        super().__init__(9.0 if destroyed else noise(scheme))
        self.info = ModelInfo("toy", "r1", "float32", LAYERS, 512)


@dataclass
class Model:
    info: ModelInfo = field(default_factory=lambda: ModelInfo("toy", "r1", "float32", LAYERS, 512))
    seen: list[str] = field(default_factory=list)

    def runner(self, scheme: Scheme, *, destroyed: bool, **_: Any) -> Runner:
        self.seen.append(scheme.label)
        return Runner(scheme, destroyed)

    def learn(self, scheme: Scheme) -> dict[str, torch.Tensor]:
        return {}


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def parts(model):
    return Parts(
        lambda spec: ModelFacts(spec.name, "float32", "r1", LAYERS, 512),
        lambda spec: None,
        lambda spec, dtype, device: model,
        make_task,
    )


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A YAML of these keys, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        row = {
            "name": "toys",
            "model": "toy",
            "dtypes": ["int8", "int4", "int2"],
            "rotations": ["none"],
            "tasks": [{"task": "divergence", "tokens": 512, "context": 128}],
            "again": False,
        }
        path = tmp_path / "toys.yaml"
        path.write_text(json.dumps({name: value for name, value in {**row, **changes}.items() if value is not None}))
        return path

    return write


# ---- the program


def brute(slots, room):
    """Every choice there is."""
    picks = itertools.product(*(range(len(slot.costs)) for slot in slots))
    fitting = [p for p in picks if sum(s.sizes[i] for s, i in zip(slots, p, strict=True)) <= room]
    return min(fitting, key=lambda p: sum(s.costs[i] for s, i in zip(slots, p, strict=True)), default=None)


@pytest.mark.parametrize("seed", range(6))
def test_the_program_is_exact(seed):
    """
    For sizes and costs of any scale it finds what trying every choice finds, and nothing where nothing fits.
    """
    draw = torch.Generator().manual_seed(seed)

    def slot():
        costs = torch.rand(3, generator=draw, dtype=torch.float64) * 10.0 ** -(1 + 2 * seed)
        return Slot(tuple(costs.tolist()), tuple((96 * torch.randint(1, 99, (3,), generator=draw)).tolist()))

    slots = [slot() for _ in range(7)]
    least = sum(min(one.sizes) for one in slots)

    for room in (least - 1, least, least + 5000, least + 12345, 10**9):
        assert cheapest(slots, room) == brute(slots, room)


def test_the_next_best_differ():
    """
    Each has two other choices at least than those before, and costs no less.
    """
    slots = [Slot((1.0, 1.1, 5.0), (3, 2, 1))] * 6
    first = cheapest(slots, 100)
    second = cheapest(slots, 100, [first], 2)
    third = cheapest(slots, 100, [first, second], 2)

    assert first == (0,) * 6
    assert sorted(second) == [0, 0, 0, 0, 1, 1]
    assert all(sum(a != b for a, b in zip(third, one, strict=True)) >= 2 for one in (first, second))


def test_a_mixed_scheme_takes_what_its_choices_say():
    """
    Bytes are those of the scheme itself, window included, for every choice that a random search makes.
    """
    listed = [
        Scheme.of({"dtype": dtype, "rotation": rotation, "window": {"sinks": 4, "recent": 1}})
        for dtype, rotation in (("int8", "center:none"), ("int4", "hadamard"), ("int2", "none"))
    ]
    (family,) = families(listed)
    layers = [(2, 64), (1, 128), (2, 64)]
    costs = {(family.window, name, side): [0.3, 0.1, 0.2] for name in ("key", "value") for side in family.keys}
    problem = Problem.of(family, costs, layers, 1000, torch.bfloat16)

    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        picks = tuple(torch.randint(0, 3, (6,), generator=draw).tolist())
        whole = problem.whole + sum(slot.sizes[pick] for slot, pick in zip(problem.slots, picks, strict=True))
        scheme = family.mixed(picks)
        assert scheme.nbytes(layers, 1000, torch.bfloat16) == whole
        assert Scheme.of(scheme.spec()) == scheme
        sides = [scheme.layer(i, 3) for i in range(3)]
        assert sides == [(family.keys[k], family.values[v]) for k, v in zip(picks[::2], picks[1::2], strict=True)]


def test_schemes_of_one_window_are_mixed_and_each_side_is_measured_once():
    """
    Two windows make two families; three schemes with two key sides are two probes, the second of keys alone.
    """
    window = {"window": {"sinks": 4}}
    rows = [{"dtype": "int4"}, {"dtype": "int2:int4", **window}, {"dtype": "int8:int4", **window}]
    plain, windowed = families([Scheme.of(row) for row in rows])

    assert (len(plain.keys), len(windowed.keys), len(windowed.values)) == (1, 2, 1)
    assert [(scheme.dtype_name, sides) for scheme, sides in windowed.probes()] == [
        ("int2_per_token_head:int4_per_token_head+s4", ("key", "value")),
        ("int8_per_token_head:int4_per_token_head+s4", ("key",)),
    ]


# ---- the whole search


def searched(path, parts, *budgets, **options):
    request = Request(budgets, context=512, best=options.pop("best", 1), tokens=256)
    return run_search(path, request, Options(**options), parts)


def test_a_search_finds_the_layers_that_matter(config, parts, tmp_path):
    """
    Keys of the layer that matters most get the bits; the table has every scheme, and a YAML that `sweep` takes.
    """
    code, document = searched(config(), parts, 8.0)

    assert code == 0
    winner = yaml.safe_load((tmp_path / "out/toys/best-8.yaml").read_text())
    scheme = Scheme.of(winner["schemes"][0])
    widths = [tuple(side.dtype.code_bits for side in scheme.layer(i, 4)) for i in range(4)]
    assert widths[0][0] == 8
    assert widths[0][0] >= widths[3][0] >= widths[1][0]
    assert all(key >= value for key, value in widths)
    kld = {row["from"]: row["kld"] for row in document.rows if row["bits_per_value"] <= 8.0}
    assert kld["by layer"] < kld["keys and values"] < kld["listed"]
    assert "less than the best listed, int4_per_token_head · none (" in document.notes[0]
    assert "luck" not in document.notes[0]
    assert {row["dtype"] for row in document.rows} >= {"int8_per_token_head", "int4_per_token_head"}

    assert run_sweep(tmp_path / "out/toys/best-8.yaml", Options(output=tmp_path / "again"), parts) == 0
    again = Store(tmp_path / "again").load().records.values()
    found = next(row for row in document.rows if row["from"] == "by layer")
    assert found["kld"] in [record.metrics[0].value for record in again if record.dtype == scheme.dtype_name]


def test_what_the_layers_cost_predicts_what_they_cost_together(config, parts):
    """
    The sum over layers and sides, each measured alone on another text, is within a third of the whole.
    """
    _, document = searched(config(), parts, 8.0, 6.0)

    rows = [row for row in document.rows if row["predicted_kld"] < 0.5]  # beyond, probabilities are saturated
    assert len(rows) >= 5
    for row in rows:
        assert row["predicted_kld"] == pytest.approx(row["kld"], rel=0.33, abs=1e-4), row


def alone(model):
    """How often one layer was measured alone."""
    return sum(label.startswith("auto+l") for label in model.seen)


def test_a_search_goes_on_where_it_stopped(config, parts, model, monkeypatch):
    """
    Stopped in the second of three probes it measures two again, eight layers and sides each; done, nothing.
    """
    real, calls = Runner.hidden_states, []

    def stops(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Runner, "hidden_states", stops)
    assert searched(config(), parts, 6.0) == (130, None)

    model.seen.clear()
    assert searched(config(), parts, 6.0)[0] == 0
    assert alone(model) == 2 * 8
    model.seen.clear()
    code, document = searched(config(), parts, 6.0)
    assert code == 0
    assert document.notes
    assert model.seen == []


def test_another_budget_measures_no_layer_again(config, parts, model):
    """
    What layers cost is kept in the run folder; what was verified before stays there too.
    """
    searched(config(), parts, 6.0)
    assert alone(model) == 3 * 8
    model.seen.clear()

    assert searched(config(), parts, 8.0)[0] == 0
    assert alone(model) == 0
    assert 1 <= len(model.seen) <= 2


def test_a_side_costs_what_it_does_behind_its_window(config, parts):
    """
    The same sides behind two windows are measured behind each, and a scheme is predicted by its own.
    """
    rows = [{"dtype": d, "rotation": "none", **w} for d in ("int4", "int2") for w in ({}, {"window": {"recent": 0}})]
    code, document = searched(config(dtypes=None, schemes=rows), parts, 6.0)

    assert code == 0
    predicted = {row["dtype"]: row["predicted_kld"] for row in document.rows}
    assert predicted["int4_per_token_head"] > 1.5 * predicted["int4_per_token_head+w0"]


def test_where_mixing_gains_nothing_it_says_so(config, parts):
    """
    With bits for the widest everywhere the best scheme is one that was listed.
    """
    _, document = searched(config(), parts, 12.0)

    assert "nothing was gained by mixing, this scheme was listed" in document.notes[0]


@pytest.mark.parametrize(
    ("changes", "budget", "message"),
    [
        ({}, 1.5, r"--budget 1.5: the smallest of these schemes takes 4.00 bits a value at 512 tokens: raise"),
        ({"model": None, "models": ["toy", "other"]}, 4, "a search is of one model, and `models` has 2"),
        ({"dtypes": ["int4"]}, 4, "there is nothing to choose from: list two schemes at least that share a window"),
        ({"tasks": ["needle"]}, 4, "a search compares schemes by their divergence: add the task divergence"),
        (
            {
                "dtypes": None,
                "schemes": [
                    {"scheme": "int4_centered", "calibration": {"tokens": 100}},
                    {"scheme": "int8_centered", "calibration": {"tokens": 200}},
                ],
            },
            4,
            "learn from several texts",
        ),
    ],
)
def test_what_cannot_be_searched_is_one_line(config, parts, changes, budget, message):
    """
    A budget below the smallest scheme, two models, one choice, no divergence, two calibration texts.
    """
    with pytest.raises(ConfigError, match=message):
        searched(config(**changes), parts, budget)


def test_it_says_how_far_the_sums_are_from_what_was_measured(config, parts):
    """
    The median of the ratios that the table shows, and how many pairs of schemes both put in one order.
    """
    _, document = searched(config(), parts, 8.0)

    shares = sorted(row["predicted_kld"] / row["kld"] for row in document.rows)
    low, middle, high = shares[0], shares[len(shares) // 2], shares[-1]
    (line,) = [note for note in document.notes if note.startswith("by its layers: ")]
    assert f"is {middle:.2f} of what was measured (median of 5 schemes; {low:.2f} to {high:.2f})" in line
    assert line.endswith("ranks 10 of 10 pairs as that does")


# ---- the command line


@pytest.fixture
def kvbench(parts, monkeypatch):
    monkeypatch.setattr("kvbench.sweep.search.command.REAL", parts)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_table_is_this(kvbench, config):
    """
    Every scheme by its bits, what it loses, what its layers say, and which no other beats; the picture's axes.
    """
    result = kvbench(
        "search", config(), "--budget", 8, "--context", 512, "--tokens", 256, "--best", 1, "--format", "md"
    )

    assert result.exit_code == 0, result.output
    assert result.stdout == (Path(__file__).parent / "search.md").read_text(encoding="utf-8")
    assert Path("out/toys/search.md").read_text(encoding="utf-8") == result.stdout


def test_what_layers_cost_can_be_reported_and_has_no_verdicts(kvbench, config):
    """
    The probes are distances from the exact cache: no comparison is INVALID, and compare says why there is none.
    """
    kvbench("search", config(), "--budget", 8, "--context", 512, "--tokens", 256, "--best", 1)

    shown = kvbench("report", "out/toys/search")
    assert shown.exit_code == 0
    assert "INVALID" not in shown.stdout
    assert "broken" not in shown.stdout
    assert "no verdicts: there is no baseline to compare with" in shown.stdout
    refused = kvbench("compare", "out/toys/search")
    assert refused.exit_code == 5
    assert "has no baseline: its cells measure distances from one" in refused.stderr


def test_plan_says_what_a_search_takes(kvbench, config):
    """
    Cells and time of each layer alone and of the sweep, by `plan --budget` as by `--dry-run`; nothing is written.
    """
    shown = kvbench("plan", config(), "--budget", 8, "--context", 512).stdout

    assert "each layer alone: toy" in shown
    assert shown.count("3 to run") == 1
    assert "to which come 3 schemes that are found, or fewer" in shown
    assert kvbench("search", config(), "--budget", 8, "--context", 512, "--dry-run").stdout == shown
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("search", "toys.yaml"), 2, "Missing option '--budget'"),
        (("search", "toys.yaml", "--budget", "0"), 2, "--budget"),
        (
            ("search", "toys.yaml", "--budget", "1"),
            2,
            "error: --budget 1: the smallest of these schemes takes 4.00 bits",
        ),
        (("plan", "toys.yaml", "--budget", "1"), 2, "error: --budget 1: the smallest of these schemes takes 4.00 bits"),
        (("search", "none.yaml", "--budget", "3"), 2, "none.yaml"),
        (("plan", "toys.yaml", "--budget", "8", "--only", "dtype=int8"), 2, "--budget goes with neither --only nor"),
        (("search", "toys.yaml", "--budget", "8", "--tokens", "256", "--plot", "x.pdf"), 2, "ends in .svg or .png"),
    ],
)
def test_bad_input_is_one_line(kvbench, config, arguments, code, message):
    """
    As the other verbs have it: said without a traceback, with exit code 2.
    """
    config()
    result = kvbench(*arguments)

    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


# ---- on a real model


@pytest.fixture(scope="module")
def tiny():
    """A random Qwen2 whose key biases outweigh all else, three layers of two KV heads of 16."""
    config = transformers.Qwen2Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "k_proj.bias" in name:
            torch.nn.init.normal_(parameter, std=20)
        elif parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    info = ModelInfo("tiny", "r1", "float32", ((2, 16),) * 3, 256)
    return TransformersModel(model, Letters(), info)


class Letters:
    """A token a letter."""

    eos_token_id = 0

    def __len__(self):
        return 97

    def encode(self, text, **_):
        return [1 + ord(letter) % 96 for letter in text]


def test_a_real_model_is_searched(config, tiny):
    """
    Centred and rotated keys behind a window, mixed by layer: what a layer costs alone is what a scheme of it costs,
    and the winner's layers are stored and learned as the YAML says.
    """
    parts = Parts(
        lambda spec: ModelFacts("tiny", "float32", "r1", ((2, 16),) * 3, 256),
        lambda spec: None,
        lambda spec, dtype, device: tiny,
        make_task,
    )
    window = {"window": {"sinks": 1}}
    centred = {"key": "center+hadamard", "value": "hadamard"}
    path = config(
        dtypes=None,
        schemes=[
            {"dtype": "int8", "rotation": {"key": "center", "value": "none"}, **window},
            {"dtype": "int4", "rotation": centred, **window},
            {"dtype": "int2", "rotation": centred, **window},
        ],
        calibration={"tokens": 500},
        tasks=[{"task": "divergence", "tokens": 768, "context": 192}],
    )

    code, document = run_search(path, Request((7.0,), 256, 1, 384), Options(), parts)

    assert code == 0
    by_layer = next(row for row in document.rows if row["from"] == "by layer")
    listed = [row for row in document.rows if row["from"] == "listed" and row["bits_per_value"] <= 7.0]
    assert 6.5 < by_layer["bits_per_value"] <= 7.0
    assert by_layer["kld"] < min(row["kld"] for row in listed)
    # other texts, and errors that are not small: within a factor
    assert 0.4 < by_layer["predicted_kld"] / by_layer["kld"] < 2.5


def test_a_layer_that_loses_nothing_costs_nothing(tiny):
    """
    `layers` of an exact scheme is 0 everywhere; of one with int2 keys in a layer that layer's keys alone cost.
    """
    task = make_task({"task": "layers", "tokens": 256, "context": 128})
    scheme = Scheme.of({"dtype": "auto", "layers": {1: {"key": "int2"}}})
    context = RunContext(
        lambda key, compute: compute(tiny.runner(Scheme.parse("auto"))),
        lambda done, total: None,
        alone=lambda layer, side: tiny.runner(scheme.alone(layer, 3, side)),
    )

    metrics = {metric.name: metric.value for metric in task.run(tiny.runner(scheme), context).metrics}

    assert metrics["kld_l1_key"] == metrics["kld_keys"] > 1e-3
    assert {name for name, value in metrics.items() if abs(value) > 1e-9} == {"kld_keys", "kld_l1_key"}
