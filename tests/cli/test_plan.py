"""`kvbench plan`: what it says before anything runs."""

from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from kvbench.sweep import command

ROOT = Path(__file__).parents[2]


def test_a_missing_file_is_said_without_torch(tmp_path):
    """
    `plan` and `sweep` look for CONFIG before they import torch.
    """
    code = """
import sys
from kvbench.cli import app
try:
    app(["VERB", "absent.yaml"], standalone_mode=False)
except BaseException as error:
    pass
print("torch" in sys.modules)
"""
    for verb in ("plan", "sweep"):
        run = subprocess.run(
            [sys.executable, "-c", code.replace("VERB", verb)], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        assert run.stdout == "False\n"
        assert run.stderr == "error: no file absent.yaml\n"


def test_a_plan_loads_torch_alone_of_what_is_large(tmp_path):
    """
    What runs a model, scores it, keeps or shows its results waits until a sweep runs; Ray and vLLM until asked for.
    """
    large = [
        "rich",
        "transformers",
        "lm_eval",
        "datasets",
        "pandas",
        "pyarrow",
        "triton",
        "ray",
        "vllm",
        "kvbench_kernels",
    ]
    code = """
import sys
from kvbench.cli import app
from kvbench.sweep.command import Options, make_executor
app(["plan", sys.argv[1]], standalone_mode=False)
make_executor(Options(devices=["cpu"]))
print("loaded:", *sorted(set(sys.argv[2:]) & set(sys.modules)))
"""
    config = ROOT / "configs/quickstart.yaml"

    run = subprocess.run(
        [sys.executable, "-c", code, str(config), *large], capture_output=True, text=True, check=True, cwd=tmp_path
    )

    assert run.stdout.endswith("loaded:\n")
    assert "26 to run" in run.stdout


def test_no_garbage_is_looked_for_while_it_plans(kvbench, toy, tmp_path, monkeypatch):
    """
    Python's collector is off until the cells are known, and on again afterwards.
    """
    on = []

    def find_model(spec):
        on.append(gc.isenabled())
        return toy.PARTS.find_model(spec)

    monkeypatch.setattr(command, "REAL", replace(toy.PARTS, find_model=find_model))
    config = toy.write_config(tmp_path / "toys.yaml", model="unknown")

    assert kvbench("plan", config).exit_code == 2
    assert on == [False]
    assert gc.isenabled()


def test_an_output_that_cannot_be_written_is_said(kvbench, toy, tmp_path):
    """
    A run folder below a file is missing here like a model would be.
    """
    (tmp_path / "file").write_text("")

    shown = kvbench("plan", toy.write_config(tmp_path / "toys.yaml"), "--output", "file/run", "--wide").stdout

    assert f"output file/run: {tmp_path / 'file'} is no folder; --output takes another" in shown


def test_that_nothing_can_be_shown_is_said_in_words(kvbench, toy, tmp_path):
    """
    Where even all answers flipped would be luck, the plan says so and gives no number.
    """
    config = toy.write_config(tmp_path / "toys.yaml", tasks=[{"task": "toy_a", "n": 4}])

    assert "  toy_a                    no difference can be shown: n=4, " in kvbench("plan", config).stdout


def test_the_plan_reads_a_run_folder_once(kvbench, toy, tmp_path, monkeypatch):
    """
    However many lines say what is done.
    """
    from kvbench.results import Store

    config = toy.write_config(tmp_path / "toys.yaml", dtypes=["int8"], tasks=["toy_a"])
    kvbench("sweep", config)
    load, loaded = Store.load, []
    monkeypatch.setattr(Store, "load", lambda self: loaded.append(self.folder) or load(self))

    assert "6 done" in kvbench("plan", config).stdout
    assert len(loaded) == 1
