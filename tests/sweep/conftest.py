import pytest


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """Toys have no use for a GPU."""
    monkeypatch.setattr("kvbench.sweep.command.default_device", lambda: "cpu")
