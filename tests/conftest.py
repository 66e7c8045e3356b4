"""What every test runs under: no hub, no other person's settings, and one process's share of the cores."""

import importlib
import os
from types import SimpleNamespace

# before anything imports torch or transformers
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# what a person's shell or a CI's may set: data, a cluster, and how wide and colored what is printed may be
for name in ("KVBENCH_DATA", "RAY_ADDRESS", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
    os.environ.pop(name, None)
# each of pytest-xdist's processes takes its share: with more threads than cores they wait for each other, several times
# as long as they compute. The process that starts them has read this file too, so it leaves the variable alone
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))

import pytest  # noqa: E402 - after the environment is set
import torch  # noqa: E402

# kernels are interpreted where no GPU can compile them; decided before one is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed():
    """Fresh and repeatable random numbers in each test."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _sweeps_look_for_no_garbage():
    """
    A sweep looks through all that is loaded at its beginning and end, which is nothing to a sweep but a third of one of
    toys; garbage of these Python itself finds.
    """
    idle = SimpleNamespace(collect=lambda: 0, freeze=lambda: None, unfreeze=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("session", "executors.inline"):
            patch.setattr(f"kvbench.sweep.{module}.gc", idle)
        yield


@pytest.fixture(scope="session")
def toy():
    """tests/sweep/toy.py: a model and tasks that take no time, by a name under which other processes import it too."""
    return importlib.import_module("toy")


@pytest.fixture
def kvbench(tmp_path, monkeypatch, toy):
    """`kvbench ARGUMENTS` over the toy model, in an empty folder."""
    from typer.testing import CliRunner

    from kvbench.cli import app
    from kvbench.sweep import command

    monkeypatch.setattr(command, "REAL", toy.PARTS)
    monkeypatch.setattr(command, "default_device", lambda: "cpu")
    monkeypatch.chdir(tmp_path)

    def run(*arguments, **options):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)

    return run
