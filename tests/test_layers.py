"""What may import what: the contracts in pyproject.toml hold, and each of them can fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter's verdict on the packages in a folder, wherever else they are installed."""
    # -S leaves out what the environment adds at start, and with it the installed copy of kvbench
    site = next(path for path in sys.path if path.endswith("site-packages"))
    program = (
        "import sys; sys.path[:0] = sys.argv[1:4]\n"
        "from importlinter.cli import lint_imports_command\n"
        "lint_imports_command(sys.argv[4:])"
    )
    return subprocess.run(
        [sys.executable, "-S", "-c", program, str(folder), str(folder / "kernels"), site, "--no-cache"],
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_point_down():
    """
    Every contract is kept.
    """
    verdict = lint(ROOT)

    assert verdict.returncode == 0, verdict.stdout + verdict.stderr
    assert " 0 broken" in verdict.stdout


def test_the_engines_layers_are_short():
    """
    Each file of the engine has under 280 lines.
    """
    files = [*(ROOT / "kvbench/runners/transformers").glob("*.py")]

    assert len(files) > 10
    assert {file.name for file in files if len(file.read_text(encoding="utf-8").splitlines()) >= 280} == set()


PLANTED = {
    "a lower layer imports a higher one": ("kvbench/cache/pages.py", "import kvbench.attention", "Imports point down"),
    "sweep and report meet": ("kvbench/report/__init__.py", "import kvbench.sweep", "Imports point down"),
    "a rotation knows a dtype": ("kvbench/transforms/none.py", "import kvbench.dtypes.base", "Imports point down"),
    "what a sweep needs knows its YAML": ("kvbench/sweep/parts.py", "import kvbench.sweep.config", "A sweep is read"),
    "a module outside all layers": ("kvbench/brand_new.py", "", "Imports point down"),
    "a dtype knows Triton": ("kvbench/dtypes/int2.py", "import triton", "Definitions are pure torch"),
    "results load torch": ("kvbench/results/store.py", "import torch", "load without torch"),
    "a report loads torch far away": ("kvbench/report/__init__.py", "import kvbench.schemes", "load without torch"),
    "a kernel knows kvbench": ("kernels/kvbench_kernels/__init__.py", "import kvbench.registry", "Kernels stand alone"),
    "a forward pass knows what asks for it": (
        "kvbench/runners/transformers/forward.py",
        "import kvbench.runners.transformers.passes",
        "The engine's layers point down",
    ),
    "a runner calls a kernel": ("kvbench/runners/base.py", "import kvbench_kernels", "meets the kernels"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_contract_can_fail(planted, tmp_path):
    """
    One forbidden import breaks the contract that forbids it.
    """
    file, line, contract = PLANTED[planted]
    for name in ("kvbench", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{line}\n")

    verdict = lint(tmp_path)

    assert verdict.returncode == 1
    assert any(contract in text and "BROKEN" in text for text in verdict.stdout.splitlines()) or (
        file == "kvbench/brand_new.py" and "brand_new" in verdict.stdout + verdict.stderr
    ), verdict.stdout + verdict.stderr


@pytest.mark.parametrize(
    "module",
    [
        "kvbench.cli",
        "kvbench.results",
        "kvbench.stats",
        "kvbench.measured",
        "kvbench.report.tables",
        "kvbench.registry",
    ],
)
def test_loads_without_torch(module):
    """
    The command line answers at once, and a report is made where torch is not installed.
    """
    program = f"import sys, {module}; print(*({{m.partition('.')[0] for m in sys.modules}} & set(sys.argv[1:])))"
    heavy = ["torch", "triton", "transformers", "lm_eval", "datasets", "kvbench_kernels"]

    done = subprocess.run([sys.executable, "-c", program, *heavy], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []
