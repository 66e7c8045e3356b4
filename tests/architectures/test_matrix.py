"""Architectures that stand for their kind: right, or refused where and because of what the line says."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from kvbench.runners import agreement, catalog
from kvbench.runners.model_files import RefusedError
from kvbench.runners.toy import toy_tokenizer
from kvbench.runners.transformers import TransformersModel

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "results/architectures/cpu.json"


@pytest.fixture(scope="module", autouse=True)
def matrix():
    """tests/architectures/matrix.py, which `make architectures` runs."""
    sys.path.insert(0, str(Path(__file__).parent))
    yield importlib.import_module("matrix")
    sys.path.remove(str(Path(__file__).parent))


@pytest.fixture
def made(matrix, tmp_path):
    """A function: an architecture's tiny model, in a folder."""

    def make(name):
        model = matrix.tiny.tiny_model(matrix.tiny.tiny_config(name))
        model.save_pretrained(tmp_path / "folder")
        toy_tokenizer().save_pretrained(tmp_path / "folder")
        return catalog.resolve(str(tmp_path / "folder"))

    return make


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gpt2",
        "opt",
        "gemma3",
        "gpt_oss",
        "qwen3_5_text",
        # windows that live in transformers' mask alone
        "qwen2_moe-window",
        "phimoe",
        # frequencies that depend on what was computed before
        "llama-dynamic",
        "phi3-longrope",
        "gemma3_text-dynamic",
        "gemma3_text-longrope",
    ],
)
def test_what_is_measured_is_right(matrix, name):
    """One pass, a shared prefix, a short request after a long one, steps and answers are plain transformers'."""
    found = matrix.ask(name)

    assert (found["outcome"], found.get("what")) == ("match", None), found
    assert found["difference"] < 1e-4


@pytest.mark.parametrize(
    ("name", "where", "line"),
    [
        ("falcon", "plan", "without transformers' attention interface"),
        ("bart", "plan", "encoders with a decoder"),
        ("mamba", "plan", "no layer that keeps keys and values"),
        ("deepseek_v3", "plan", "no keys and values of one shape"),
        ("llama4_text", "plan", "attend in chunks"),
        ("llama-bidirectional", "plan", "reads tokens that follow"),
        ("bert", "load", "read tokens that follow"),
        ("diffllama", "load", "attend 2 times a pass in layer 0"),
        ("doge", "load", "add to the attention scores"),
        # its positions begin behind its padding token's id, which no configuration says
        ("roberta-decoder", "agreement", "this runner is not the model: in one prompt"),
    ],
)
def test_what_would_be_wrong_is_refused(matrix, name, where, line):
    """In one line, as early as it can be known."""
    found = matrix.ask(name)

    assert (found["outcome"], found["where"]) == ("refused", where), found
    assert line in found["line"]
    assert "\n" not in found["line"]


def test_a_window_that_is_not_kept_is_found(made):
    """The comparison reaches behind a window, and says so."""
    loaded = TransformersModel.load(made("mistral"))
    assert agreement.check(loaded).largest < 1e-4

    loaded.__dict__["windows"] = dict.fromkeys(loaded.windows)
    with pytest.raises(RefusedError, match="is not the model: in one prompt"):
        agreement.check(loaded)


def test_logits_that_are_not_finite_are_refused(made):
    """Damaged weights are no model's."""
    loaded = TransformersModel.load(made("llama"))
    loaded.model.get_output_embeddings().weight[0, 0] = torch.nan

    with pytest.raises(RefusedError, match="logits are not finite"):
        agreement.check(loaded)


def test_weights_that_a_file_lacks_are_refused(made, caplog):
    """transformers would draw them; so are weights that the architecture has no place for. That line is all."""
    from safetensors.torch import load_file, save_file

    source = made("llama")
    file = source.path / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"

    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(RefusedError, match=f"files lack {name}"):
        TransformersModel.load(source)
    save_file({**weights, "model.layers.9.mlp.up_proj.weight": weights[name].clone()}, file, {"format": "pt"})
    with pytest.raises(RefusedError, match=r"have besides model.layers.9"):
        TransformersModel.load(source)
    assert caplog.text == ""


def test_the_committed_matrix_has_nothing_wrong(matrix):
    """None of transformers' causal language models is measured wrongly, and the documentation has the counts."""
    rows = json.loads(RECORD.read_text())["architectures"]

    assert {row["name"] for row in rows} == set(matrix.tiny.names())
    assert not [row for row in rows if row["outcome"] in ("WRONG", "raises")]
    assert matrix.table(rows) in (ROOT / "docs/method.md").read_text()
