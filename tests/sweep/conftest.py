import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def toy():
    """tests/sweep/toy.py: a model and tasks that take no time."""
    spec = importlib.util.spec_from_file_location("kvbench_toy_sweep", Path(__file__).with_name("toy.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """Toys have no use for a GPU, where a sweep would run them in a process that can't import them."""
    monkeypatch.setattr("kvbench.sweep.command.default_device", lambda: "cpu")
