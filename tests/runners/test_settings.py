"""What is known of a model's answers before it is loaded: its chat template, and its generation_config.json."""

import json
from dataclasses import replace

import pytest

from kvbench.runners.catalog import EMBEDDED, ModelSource, resolve
from kvbench.runners.facts import generation_settings, has_chat_template
from kvbench.runners.gguf import read_gguf
from kvbench.sweep.config import parse_sweep
from kvbench.sweep.parts import REAL
from kvbench.sweep.plan import plan, unsuited

SWEEP = "{name: t, model: smollm2-135m-instruct, dtypes: [int8], tasks: [needle, divergence]}"


@pytest.fixture
def folder(tmp_path):
    def made(**files):
        for name, content in files.items():
            (tmp_path / name.replace("__", ".")).write_text(json.dumps(content))
        return ModelSource("m", "folder", tmp_path)

    return made


def test_only_what_changes_an_answer_is_a_setting(folder):
    """
    Qwen2.5's file, of which greedy answers follow the penalty alone; a file of no such setting, and no file, say none.
    """
    qwen = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.1,
        "eos_token_id": [2, 1],
    }

    assert generation_settings(folder()) == {}
    assert generation_settings(folder(generation_config__json={"num_beams": 1, "repetition_penalty": 1.0})) == {}
    assert generation_settings(folder(generation_config__json=qwen)) == {"repetition_penalty": 1.1}


def test_a_chat_template_is_found_without_a_tokenizer(folder):
    """
    In the tokenizer's configuration, or in a file of its own.
    """
    assert has_chat_template(folder(tokenizer_config__json={})) is False
    assert has_chat_template(folder(tokenizer_config__json={"chat_template": "{{ messages }}"})) is True
    assert has_chat_template(folder(tokenizer_config__json={}, chat_template__jinja="{{ messages }}")) is True
    assert has_chat_template(ModelSource("m", "hub", missing="hf download m")) is None


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_models_file_has_the_template_that_the_catalog_says(name):
    """
    The catalog says without reading the file whether it has a chat template.
    """
    source = resolve(name)
    if not source.available or len(source.slices) != 1:
        pytest.skip(f"{name} is not on this machine as one file: {source.missing or 'joined when first loaded'}")

    assert bool(read_gguf(source.path).get("tokenizer.chat_template")) == has_chat_template(source)


@pytest.mark.parametrize(
    ("settings", "line"),
    [({"repetition_penalty": 1.1}, ""), ({"num_beams": 4}, "generation_config.json sets num_beams to 4")],
    ids=["followed", "refused"],
)
def test_a_plan_knows_the_settings_of_answers(settings, line):
    """
    They are in the identity of a cell that gives answers, of no other, and a plan names what is not followed.
    """
    facts = replace(REAL, find_model=lambda spec: replace(REAL.find_model(spec), generation=json.dumps(settings)))
    before, after = (plan(parse_sweep(SWEEP, "t.yaml"), parts=parts) for parts in (REAL, facts))

    for old, new in zip(before, after, strict=True):
        assert old.task.name == new.task.name
        assert new.identity == old.identity | ({"generation": settings} if new.task.name == "needle" else {})
        assert (new.name == old.name) == (new.task.name == "divergence")
    assert [line in told for told in unsuited(after)] == ([True] if line else [])
