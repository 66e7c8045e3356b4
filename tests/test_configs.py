"""The configurations that ship with kvbench can be used as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbench.dtypes import all_dtypes
from kvbench.sweep.command import Options, prepare
from kvbench.sweep.config import load_sweep
from kvbench.sweep.plan_document import plan_document

CONFIGS = Path(__file__).parent.parent / "configs"
SWEEPS = [path for path in sorted(CONFIGS.glob("*.yaml")) if "\ntasks:" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_config_can_be_planned_offline(path, tmp_path, monkeypatch):
    """
    Every sweep validates and is laid out without a network, from the checkout's root; what it lacks here it says with
    what to do.
    """
    monkeypatch.chdir(CONFIGS.parent)
    planned = prepare(path, Options(output=tmp_path))

    assert planned.sweep.name == path.stem
    assert planned.cells[0].baseline
    shown = plan_document(planned)
    assert shown.tables
    missing = [line for line in shown.notes if line.startswith("missing")]
    assert missing or "nothing is missing here" in shown.notes


def test_the_quickstart_needs_nothing_from_outside():
    """
    It runs on the embedded model and built-in texts, over six dtypes at least and both rotations of int4 and int2.
    """
    sweep = load_sweep(CONFIGS / "quickstart.yaml")
    schemes = {(scheme.dtype_name, scheme.rotation_name) for scheme in sweep.all_schemes()}

    assert all(not task.missing() for task in sweep.make_tasks())
    assert len({dtype for dtype, _ in schemes}) >= 6
    assert {("int4_per_token_head", "none"), ("int4_per_token_head", "randomized_hadamard")} <= schemes
    assert {("int2_per_token_head", "none"), ("int2_per_token_head", "hadamard")} <= schemes


def test_the_qwen_table_has_the_seed_s_dtypes_with_and_without_their_rotation():
    """
    It is the table that the 2- and 4-bit caches were proposed with.
    """
    sweep = load_sweep(CONFIGS / "qwen.yaml")
    seed = ("fp16", "fp8_per_tensor", *(f"{name}_per_token_head" for name in ("fp8", "int8", "int4", "int2")))

    wanted = {(name, all_dtypes()[name].default_rotation) for name in seed}
    wanted |= {(name, "none") for name, _ in wanted}
    assert {(scheme.dtype_name, scheme.rotation_name) for scheme in sweep.all_schemes()} == wanted
