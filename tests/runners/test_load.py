"""Loading models."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from kvbench.runners import catalog, facts, load
from kvbench.runners.model_files import ModelError
from kvbench.sweep.parts import REAL
from kvbench.sweep.spec import ModelSpec

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": True}


def test_a_hub_model_that_is_not_here_cannot_be_loaded_offline(hub):
    """Where the hub is switched off, the message says what to fetch, and no connection is tried."""
    with pytest.raises(ModelError, match="hf download org/absent --revision v2"):
        load.load(catalog.resolve("org/absent", revision="v2"), "float32")


def test_a_network_that_fails_is_one_line(hub, monkeypatch):
    """A download that fails, of whatever cause, says for which model."""

    def fail(*args, **options):
        raise OSError("name resolution\nfailed")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)

    with pytest.raises(ModelError, match=r"model 'org/absent' .* cannot be fetched: name resolution failed"):
        load.load(catalog.resolve("org/absent"), "float32")


@pytest.fixture
def folder(tmp_path, cache):
    """A small model folder, as `save_pretrained` writes it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, vocab_size=300)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "folder")
    tokenizer = Tokenizer(models.BPE(vocab={"h": 0, "e": 1, "he": 2, "</s>": 3}, merges=[("h", "e")]))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, eos_token="</s>")
    fast.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_loaded_model_is_ready_to_be_measured(folder, dtype):
    """In the dtype asked for, in eval mode, without gradients, and named without its path."""
    model, tokenizer, info, _ = load.load(catalog.resolve(str(folder)), dtype)

    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer("he").input_ids
    assert (info.name, info.compute_dtype, info.layers, info.max_length) == ("folder", dtype, ((2, 16),) * 2, 128)


def test_model_args_decide_how_a_model_is_loaded(folder):
    """Its facts and its weights have the dtype that lm-eval's words name; a folder has no revision."""
    spec = ModelSpec(name=str(folder), model_args="dtype=bfloat16,trust_remote_code=False")
    found = REAL.find_model(spec)
    assert found.compute_dtype == "bfloat16"
    assert REAL.open_model(spec, found.compute_dtype, "cpu").model.dtype == torch.bfloat16

    with pytest.raises(ModelError, match=r"has no revisions: only a hub id takes one \(got 'main'\)"):
        REAL.find_model(ModelSpec(name=str(folder), model_args={"revision": "main"}))


def test_a_broken_folder_is_one_line(folder):
    """Weights that can't be read, or a configuration of no known type, name the model and no line of ours."""
    source = catalog.resolve(str(folder))
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="model 'folder' cannot be loaded") as caught:
        load.load(source, "float32")
    assert "\n" not in str(caught.value)

    (folder / "config.json").write_text('{"model_type": "nobody-knows"}')
    with pytest.raises(ModelError, match="nobody-knows"):
        load.load(source, "float32")
    with pytest.raises(ModelError, match="nobody-knows"):
        facts.shape(source)


def test_an_unknown_compute_dtype_is_refused(folder):
    """Only the three that a record can name."""
    with pytest.raises(ModelError, match="unknown compute dtype 'fp8': one of float32"):
        load.load(catalog.resolve(str(folder)), "fp8")


def test_a_revision_is_of_the_content(folder):
    """The same files elsewhere are the same revision; another weight or another configuration is another."""
    before = facts.revision(catalog.resolve(str(folder)))
    moved = folder.rename(folder.parent / "moved")
    assert facts.revision(catalog.resolve(str(moved))) == before

    weights = moved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    other_weight = facts.revision(catalog.resolve(str(moved)))
    weights.write_bytes(content)
    assert facts.revision(catalog.resolve(str(moved))) == before
    (moved / "config.json").write_text((moved / "config.json").read_text() + "\n")

    assert len({before, other_weight, facts.revision(catalog.resolve(str(moved)))}) == 3


EVIL = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({marker!r}).touch()
class Evil(PreTrainedTokenizerFast):
    pass
"""


def with_code(folder, marker):
    """The folder with a tokenizer that is Python code, which leaves a file where it ran."""
    file = folder / "tokenizer_config.json"
    said = json.loads(file.read_text()) | {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": [None, "evil.Evil"]},
    }
    file.write_text(json.dumps(said))
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    return folder


def test_code_that_comes_with_a_model_does_not_run(folder, tmp_path, monkeypatch):
    """
    One line that names the YAML's key, and nobody is asked; with that key it runs, and is part of the revision.
    """
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody sits here to answer"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path / "modules")])
    with_code(folder, tmp_path / "ran")
    source = catalog.resolve(str(folder))

    with pytest.raises(ModelError, match=r"Python code of its own.*trust_remote_code: true"):
        load.load(source, "float32")
    assert not (tmp_path / "ran").exists()

    trusted = replace(source, trusted=True)
    _, tokenizer, info, _ = load.load(trusted, "float32")
    assert (tmp_path / "ran").exists()
    assert type(tokenizer).__name__ == "Evil"
    (folder / "evil.py").write_text("# other code")
    assert facts.revision(trusted) != info.revision


def test_a_tokenizer_of_another_model_is_refused(folder):
    """One without an end-of-text token, or with more tokens than the embedding has rows, is named in one line."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="no end-of-text token"):
        load.load(catalog.resolve(str(folder)), "float32")

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, vocab_size=2)).save_pretrained(folder)
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="tokenizer has 4 tokens and its embedding 2"):
        load.load(catalog.resolve(str(folder)), "float32")


@pytest.mark.parametrize(
    ("name", "bias", "has"),
    [
        ("model.layers.0.self_attn.k_proj.bias", 1.0, True),
        ("transformer.h.0.attn.c_attn.bias", 1.0, True),
        ("gpt_neox.layers.0.attention.query_key_value.bias", 1.0, True),
        ("model.layers.0.self_attn.k_proj.bias", 0.0, False),
        ("model.layers.0.self_attn.q_proj.bias", 1.0, False),
        ("model.layers.0.mlp.key_value_gate.bias", 1.0, False),
    ],
)
def test_a_bias_of_keys_is_found_by_the_weights(name, bias, has):
    """
    Of whatever architecture: a bias other than 0 of the projection that makes keys, alone or with others.
    """
    model = torch.nn.Module()
    model.named_parameters = lambda: [(name, torch.full((3,), bias))]

    assert load._has_key_bias(model) == has
