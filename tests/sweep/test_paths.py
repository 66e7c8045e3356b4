"""Paths in a sweep's YAML are the file's, wherever the command is given."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvbench.sweep.command import Options, prepare
from kvbench.sweep.config import load_sweep
from kvbench.sweep.paths import anchor

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_config_with_a_shape_beside_it_works_from_anywhere(tmp_path, monkeypatch):
    """
    configs/throughput.yaml names shapes/qwen3-8b.json, and is planned from another folder and copied elsewhere.
    """
    shutil.copytree(CONFIGS, tmp_path / "copied")
    monkeypatch.chdir(tmp_path)

    for path in (CONFIGS / "throughput.yaml", Path("copied/throughput.yaml")):
        planned = prepare(path, Options())
        assert planned.cells[0].model.name == "qwen3-8b (random weights)"
        assert planned.sweep.config()["model"]["name"] == "shapes/qwen3-8b.json"


def test_paths_of_the_yaml_are_the_files_and_those_of_a_setting_the_commands(tmp_path, monkeypatch):
    """
    data, text and a calibration's text are found beside the YAML; --set names files as any flag does.
    """
    far, here = tmp_path / "far", tmp_path / "here"
    for folder, text in ((far, "far " * 20000), (here, "here " * 20000)):
        (folder / "mirror").mkdir(parents=True)
        (folder / "text.txt").write_text(text)
    (far / "sweep.yaml").write_text(
        "{name: x, model: smollm2, dtypes: [int8], data: mirror, calibration: {text: text.txt, tokens: 64},\n"
        "tasks: [{task: divergence, text: text.txt}]}"
    )
    monkeypatch.chdir(here)

    sweep = load_sweep(Path("../far/sweep.yaml"))
    own = load_sweep(Path("../far/sweep.yaml"), ["tasks[0].text=text.txt", "data=mirror"])

    assert sweep.data_folder().resolve() == far / "mirror"
    assert sweep.make_tasks()[0].text.resolve() == far / "text.txt"
    assert Path(sweep.calibration["text"]).resolve() == far / "text.txt"
    assert sweep.config()["tasks"] == [{"task": "divergence", "text": "text.txt"}]
    assert own.data_folder() == Path("mirror")
    assert own.make_tasks()[0].text == Path("text.txt")


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("own/model", "there/own/model"),
        ("./model", "there/model"),
        ("../a.gguf", "there/../a.gguf"),
        ("/models/a.gguf", "/models/a.gguf"),
    ],
)
def test_which_models_are_files(name, means, tmp_path, monkeypatch):
    """
    A name is a path where it looks like one, or where a folder beside the YAML has it; else it is a model's name.
    """
    (tmp_path / "there/own/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    data = {"models": [name, {"name": name}]}

    anchor(data, Path("there"))

    assert data == {"models": [means, {"name": means}]}
