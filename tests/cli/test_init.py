"""`kvbench init`, `kvbench schema` and each verb's help: what helps a person to begin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvbench.cli import app
from kvbench.sweep import command
from kvbench.sweep.config import load_sweep, parse_sweep
from kvbench.sweep.first import first_sweep
from kvbench.sweep.parts import REAL
from kvbench.sweep.plan import plan, too_long, unsuited

ROOT = Path(__file__).parents[2]
SHAPE = ROOT / "configs" / "shapes" / "qwen3-8b.json"


def test_a_first_sweep_can_be_planned(kvbench):
    """
    init writes a YAML that loads as it is, with the schema that its first line names; it replaces no file.
    """
    written = kvbench("init", "smollm2-135m-instruct")
    sweep = load_sweep(Path("smollm2-135m-instruct.yaml"))

    assert written.stdout.splitlines()[-1] == "next: kvbench plan smollm2-135m-instruct.yaml"
    assert sweep.name == "smollm2-135m-instruct"
    assert {task.name for task in sweep.make_tasks()} == {"divergence", "needle"}
    assert (
        Path("smollm2-135m-instruct.yaml").read_text().startswith("# yaml-language-server: $schema=sweep.schema.json\n")
    )
    assert json.loads(Path("sweep.schema.json").read_text())["title"] == "A sweep of kvbench"
    again = kvbench("init", "smollm2-135m-instruct")
    assert again.exit_code == 2
    assert "is there already, and stays as it is; --output names another" in again.stderr


def test_a_first_sweep_fits_model_and_machine(toy):
    """
    No sequence is longer than the model takes; a GPU gets more and longer ones than a CPU.
    """
    cpu, gpu = (first_sweep("toy", toy.PARTS, device)[1] for device in ("cpu", "cuda"))

    assert "# toy: 3 layers, 2 KV heads of 64, up to 1024 tokens." in cpu
    assert "tokens: 2k, context: 512}" in cpu
    assert "context: 1k}" in gpu
    assert "4k" not in gpu


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "qwen2"}, "its keys have a bias"),
        ({"model_type": "qwen3"}, "its keys have no bias"),
        ({"model_type": "qwen3", "attention_bias": True}, "its keys have a bias"),
    ],
)
def test_a_first_sweep_says_why_keys_are_centred(tmp_path, config, why):
    """
    As far as the model's configuration says: Qwen2's keys always get a bias, others' where it is turned on.
    """
    shape = json.loads(SHAPE.read_text())
    (tmp_path / "shape.json").write_text(json.dumps({**shape, **config}))

    assert why in first_sweep(str(tmp_path / "shape.json"), REAL, "cpu")[1]


def test_a_first_sweep_of_random_weights_times_them(tmp_path):
    """
    They have no tokenizer: a task that reads text is told by the plan, and init asks for speed alone, which they can.
    """
    file = tmp_path / "shape.json"
    file.write_text(SHAPE.read_text())
    text = first_sweep(str(file), REAL, "cpu")[1]
    planned = plan(parse_sweep(text, "t.yaml"))

    assert {cell.task.name for cell in planned} == {"throughput"}
    assert not any(cell.canary for cell in planned)
    assert unsuited(planned) + too_long(planned) == []
    told = unsuited(plan(parse_sweep(text, "t.yaml", ["tasks=[{task: divergence, tokens: 64, context: 32}]"])))
    assert told == [
        "model shape (random weights), task divergence: a model of random weights has no tokenizer: run the task "
        "throughput, which needs none"
    ]


def test_a_shape_of_no_model_is_bad_input(kvbench, tmp_path, monkeypatch):
    """
    The plan lays it out without memory, and says what transformers says of it; no cell has to fail for it.
    """
    monkeypatch.setattr(command, "REAL", REAL)
    shape = json.loads(SHAPE.read_text())
    Path("shape.json").write_text(json.dumps({**shape, "num_hidden_layers": 1, "num_attention_heads": 0}))
    Path("t.yaml").write_text("{name: t, model: shape.json, dtypes: [fp16], tasks: [throughput]}")

    refused = kvbench("plan", "t.yaml")

    assert refused.exit_code == 2
    assert "error: t.yaml:1:18: model: model 'shape (random weights)' cannot be laid out: " in refused.stderr


def test_weights_that_memory_can_not_hold_are_refused(kvbench, tmp_path, monkeypatch):
    """
    Before the system would end the process for them: the plan says so, and the sweep is refused with exit code 4.
    """
    monkeypatch.setattr(command, "REAL", REAL)
    monkeypatch.setattr("kvbench.sweep.plan_document.default_device", lambda: "cpu")
    monkeypatch.setattr("kvbench.sweep.plan.host_memory", lambda: 23 * 2**30)
    config = ROOT / "configs" / "throughput.yaml"
    line = (
        "model qwen3-8b (random weights): its weights take 30.5 GiB in float32, and this machine has 23.0: take a "
        "smaller model, or a machine with a GPU"
    )
    where = ("--set", "compute_dtype=float32", "--only", "dtype=fp16", "--output", "run")

    shown, refused = (kvbench(verb, config, *where) for verb in ("plan", "sweep"))

    assert line in " ".join(shown.stdout.split())
    assert "memory: 30.5 GiB of weights (qwen3-8b (random weights))" in shown.stdout
    assert refused.exit_code == 4
    assert refused.stderr == f"error: this machine lacks what the sweep needs\n  {line}\n"
    monkeypatch.setattr("kvbench.sweep.plan.host_memory", lambda: 31 * 2**30)
    assert line not in " ".join(kvbench("plan", config, *where).stdout.split())


def test_a_first_sweep_of_a_folder_names_it_from_the_yaml(tmp_path, monkeypatch):
    """
    A model's path is relative to the file that is written.
    """
    from kvbench.sweep.first import write_first

    shape = SHAPE
    (tmp_path / "shape.json").write_text(shape.read_text())
    (tmp_path / "sweeps").mkdir()
    monkeypatch.chdir(tmp_path)

    write_first("shape.json", Path("sweeps/first.yaml"), {}, REAL)

    assert "\nmodel: '../shape.json'\n" in Path("sweeps/first.yaml").read_text()
    assert load_sweep(Path("sweeps/first.yaml")).all_models[0].name == "sweeps/../shape.json"


def test_an_unknown_model_is_one_line(kvbench):
    """
    A name that can be no model is bad input, and nothing is written.
    """
    refused = kvbench("init", "smolm2-135m-instruct")

    assert refused.exit_code == 2
    assert "did you mean smollm2-135m-instruct?" in refused.stderr
    assert not list(Path().iterdir())


def test_the_schema_says_what_each_key_means(kvbench):
    """
    Every key and task option has a description, and numbers of tokens may be written as 16k.
    """
    found = json.loads(kvbench("schema").stdout)

    assert all(key["description"] for key in found["properties"].values())
    tasks = [one for one in found["properties"]["tasks"]["items"]["anyOf"] if "properties" in one]
    assert {one["properties"]["task"].get("const") for one in tasks} >= {"divergence", "needle", "throughput", None}
    for one in tasks:
        assert all("description" in key for name, key in one["properties"].items() if name != "task")
    (divergence,) = [one for one in tasks if one["properties"]["task"].get("const") == "divergence"]
    assert {"type": "string", "pattern": "^[0-9]+[kK]$"} in divergence["properties"]["tokens"]["anyOf"]


def commands():
    import typer

    def below(command, name):
        for child, one in getattr(command, "commands", {}).items():
            yield (*name, child)
            yield from below(one, (*name, child))

    return list(below(typer.main.get_command(app), ()))


@pytest.mark.parametrize("verb", commands(), ids=" ".join)
def test_each_help_has_examples(kvbench, verb):
    """
    Below the options stand commands to copy, each beginning with kvbench and this verb.
    """
    _, _, examples = kvbench(*verb, "--help").stdout.partition("Examples:\n")

    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    assert lines
    assert all(line.startswith(f"kvbench {verb[0]}") for line in lines)


def test_completion_is_on(kvbench):
    """
    The shell's completion can be installed.
    """
    assert "--install-completion" in kvbench("--help").stdout
